"""What the agent exports: the names and labels that dcgm-exporter has, and what it lacks.

Everything is made anew at each scrape from what is now, so no series outlives what it tells of. Counters of
NVIDIA's keep the names that dashboards know, without the suffix that OpenMetrics wants of counters; so their
type is unknown.
"""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.registry import Collector

from keepstep.agent.probes.gpu.reading import Activity, Fast, Heat, Links, Pcie, Reading, Rows
from keepstep.agent.probes.health import Health
from keepstep.core.health import FaultKind, ProbeState
from keepstep.wire.health import HealthStatus
from keepstep.wire.messages import AttemptStatus

MIB = 1 << 20
LABELS = ("gpu", "UUID", "pci_bus_id", "device", "modelName", "Hostname")


class Metrics(Collector):
    def __init__(
        self, health: Health, hostname: str, attempts: Callable[[], Iterable[AttemptStatus]]
    ) -> None:
        self._health, self._hostname, self._attempts = health, hostname, attempts

    def collect(self) -> Iterable[Metric]:
        status = self._health.status()
        readings = list(self._health.sampler.evolution.readings.values())
        yield from self._devices(readings, status)
        yield from self._faults(status)
        yield from self._ranks()

    def _labels(self, reading: Reading) -> list[str]:
        gpu = reading.gpu
        return [str(gpu.index), gpu.uuid, gpu.pci, f"nvidia{gpu.index}", gpu.name, self._hostname]

    def _devices(self, readings: list[Reading], status: HealthStatus) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        last: dict[str, tuple[float, int]] = {}
        for fault in status.faults:
            if fault.kind == FaultKind.XID:
                newest = last.get(fault.component)
                if newest is None or fault.last_age_s < newest[0]:
                    last[fault.component] = fault.last_age_s, fault.code
        for reading in readings:
            figures = _figures(reading, *self._health.sampler.evolution.pcie_bytes_per_s(reading.gpu.uuid))
            if self._health.sampler.blind == "" or reading.gpu.uuid in last:
                figures["DCGM_FI_DEV_XID_ERRORS"] = last.get(reading.gpu.uuid, (0.0, 0))[1]
            for name, value in figures.items():
                if value is None:
                    continue
                family = families.get(name)
                if family is None:
                    kind, text = DESCRIPTIONS[name]
                    family = families[name] = kind(name, text, labels=LABELS)
                family.add_metric(self._labels(reading), value)  # type: ignore[attr-defined]
        yield from families.values()

    def _faults(self, status: HealthStatus) -> Iterator[Metric]:
        by_uuid = {r.gpu.uuid: self._labels(r) for r in self._health.sampler.evolution.readings.values()}
        xids = CounterMetricFamily(
            "keepstep_gpu_xid_errors", "XIDs since boot, by code: each once.", labels=[*LABELS, "xid"]
        )
        others = CounterMetricFamily(
            "keepstep_faults", "What happened on this node since boot.", labels=["kind", "code", "component"]
        )
        for fault in status.faults:
            labels = by_uuid.get(fault.component)
            if fault.kind == FaultKind.XID and labels is not None:
                xids.add_metric([*labels, str(fault.code)], fault.count)
            else:
                others.add_metric([fault.kind, str(fault.code), fault.component], fault.count)
        yield from (xids, others)
        checks = GaugeMetricFamily(
            "keepstep_check",
            "What is not well now, by what is measured.",
            labels=["check", "component", "level"],
        )
        for check in status.checks:
            checks.add_metric([check.name, check.component, check.level], check.value)
        yield checks
        probes = GaugeMetricFamily("keepstep_probe_state", "1: it is in it.", labels=["probe", "state"])
        for probe in status.probes:
            for state in ProbeState:
                probes.add_metric([probe.name, state], float(probe.state == state))
        yield probes
        yield GaugeMetricFamily(
            "keepstep_probe_pass_cpu_seconds", "Of the last look at all GPUs.",
            value=self._health.sampler.pass_cpu_ms / 1e3,
        )  # fmt: skip

    def _ranks(self) -> Iterator[Metric]:
        """Only of ranks that run now: which GPU they have, and how far they are."""
        labels = ["job", "rank", "gpu_uuid"]
        step = GaugeMetricFamily("keepstep_rank_step", "Completed optimizer steps.", labels=labels)
        age = GaugeMetricFamily("keepstep_rank_step_age_seconds", "Since its step advanced.", labels=labels)
        for attempt in self._attempts():
            for rank in attempt.ranks:
                if rank.state == "running" and rank.step >= 0:
                    names = [attempt.job, str(rank.rank), rank.gpu]
                    step.add_metric(names, rank.step)
                    if rank.step_age_s is not None:
                        age.add_metric(names, rank.step_age_s)
        yield from (step, age)


DESCRIPTIONS: dict[str, tuple[type[GaugeMetricFamily] | type[UnknownMetricFamily], str]] = {
    "DCGM_FI_DEV_GPU_UTIL": (GaugeMetricFamily, "GPU utilization (in %)."),
    "DCGM_FI_DEV_MEM_COPY_UTIL": (GaugeMetricFamily, "Memory utilization (in %)."),
    "DCGM_FI_DEV_SM_CLOCK": (GaugeMetricFamily, "SM clock frequency (in MHz)."),
    "DCGM_FI_DEV_MEM_CLOCK": (GaugeMetricFamily, "Memory clock frequency (in MHz)."),
    "DCGM_FI_DEV_GPU_TEMP": (GaugeMetricFamily, "GPU temperature (in C)."),
    "DCGM_FI_DEV_MEMORY_TEMP": (GaugeMetricFamily, "Memory temperature (in C)."),
    "DCGM_FI_DEV_POWER_USAGE": (GaugeMetricFamily, "Power draw (in W)."),
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": (UnknownMetricFamily, "Total energy consumption (in mJ)."),
    "DCGM_FI_DEV_FB_USED": (GaugeMetricFamily, "Framebuffer memory used (in MiB)."),
    "DCGM_FI_DEV_FB_FREE": (GaugeMetricFamily, "Framebuffer memory free (in MiB)."),
    "DCGM_FI_DEV_XID_ERRORS": (GaugeMetricFamily, "Value of the last XID error encountered."),
    "DCGM_FI_DEV_PCIE_REPLAY_COUNTER": (UnknownMetricFamily, "Total number of PCIe retries."),
    "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS": (UnknownMetricFamily, "Remapped rows, uncorrectable errors."),
    "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS": (UnknownMetricFamily, "Remapped rows, correctable errors."),
    "DCGM_FI_DEV_ROW_REMAP_FAILURE": (GaugeMetricFamily, "Whether remapping of rows has failed."),
    "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL": (UnknownMetricFamily, "NVLink traffic, all lanes (in MB)."),
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE": (GaugeMetricFamily, "Ratio of time the graphics engine is active."),
    "DCGM_FI_PROF_SM_ACTIVE": (GaugeMetricFamily, "Ratio of cycles an SM has at least one warp assigned."),
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": (GaugeMetricFamily, "Ratio of cycles the tensor pipe is active."),
    "DCGM_FI_PROF_DRAM_ACTIVE": (GaugeMetricFamily, "Ratio of cycles the memory interface is active."),
    "DCGM_FI_PROF_PCIE_TX_BYTES": (GaugeMetricFamily, "Bytes sent over PCIe (per second)."),
    "DCGM_FI_PROF_PCIE_RX_BYTES": (GaugeMetricFamily, "Bytes received over PCIe (per second)."),
}  # fmt: skip


def _figures(reading: Reading, tx: float | None, rx: float | None) -> dict[str, float | None]:
    """By name; None: this GPU does not tell it."""
    fast, heat = reading.fast or Fast(0.0), reading.heat or Heat(0.0)
    activity, rows = reading.activity or Activity(0.0), reading.rows or Rows(0.0)
    links, pcie = reading.links or Links(0.0), reading.pcie or Pcie(0.0)
    free = None
    if fast.memory_total is not None and fast.memory_used is not None:
        free = (fast.memory_total - fast.memory_used) / MIB
    return {
        "DCGM_FI_DEV_GPU_UTIL": fast.utilisation,
        "DCGM_FI_DEV_MEM_COPY_UTIL": fast.memory_utilisation,
        "DCGM_FI_DEV_SM_CLOCK": fast.sm_clock,
        "DCGM_FI_DEV_MEM_CLOCK": fast.memory_clock,
        "DCGM_FI_DEV_GPU_TEMP": heat.temperature,
        "DCGM_FI_DEV_MEMORY_TEMP": heat.memory_temperature,
        "DCGM_FI_DEV_POWER_USAGE": fast.power_w,
        "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": fast.energy_mj,
        "DCGM_FI_DEV_FB_USED": None if fast.memory_used is None else fast.memory_used / MIB,
        "DCGM_FI_DEV_FB_FREE": free,
        "DCGM_FI_DEV_PCIE_REPLAY_COUNTER": pcie.replays,
        "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS": rows.uncorrectable,
        "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS": rows.correctable,
        "DCGM_FI_DEV_ROW_REMAP_FAILURE": rows.failed,
        "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL": None if links.kib is None else links.kib * 1024 / 1e6,
        "DCGM_FI_PROF_GR_ENGINE_ACTIVE": activity.graphics,
        "DCGM_FI_PROF_SM_ACTIVE": activity.sm,
        "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": activity.tensor,
        "DCGM_FI_PROF_DRAM_ACTIVE": activity.dram,
        "DCGM_FI_PROF_PCIE_TX_BYTES": tx,
        "DCGM_FI_PROF_PCIE_RX_BYTES": rx,
    }
