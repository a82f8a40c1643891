"""What an agent's probes say of its node, as a part of its state."""

from keepstep.wire.part import Part


class GpuSample(Part, kw_only=True, frozen=True):
    """One GPU as its driver tells it now. None: this driver or GPU does not tell."""

    uuid: str
    index: int
    pci: str = ""  # 0000:0f:00.0
    name: str = ""
    utilisation: float | None = None  # percent of the last sample period in which a kernel ran
    sm_active: float | None = None  # 0..1, GPM
    tensor_active: float | None = None  # 0..1, GPM
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttled: tuple[str, ...] = ()  # thermal | power | hardware | other
    power_w: float | None = None
    energy_j: float | None = None  # since the driver was loaded
    temperature_c: float | None = None
    memory_temperature_c: float | None = None
    pcie_width: int | None = None
    pcie_generation: int | None = None
    recovery_action: int | None = None
    age_s: float = 0.0  # of this sample: it grows while the driver hangs


class Check(Part, kw_only=True, frozen=True):
    """One component that is not well now: `core.health.CHECKS` has the names and the units of values."""

    name: str
    component: str = ""  # a GPU's UUID, an interface, a device, a path; "": the node
    level: str = "warn"  # core.health.Level
    value: float = 0.0
    limit: float | None = None  # the threshold that it has crossed
    text: str = ""
    for_s: float = 0.0  # it has stood so for so long


class FaultCount(Part, kw_only=True, frozen=True):
    """Events of one kind on one component since boot: `core.health.FaultKind`."""

    kind: str
    code: int = 0
    component: str = ""
    count: int = 1  # never falls within one boot
    first_age_s: float = 0.0
    last_age_s: float = 0.0
    text: str = ""  # the newest line
    pid: int = 0  # of the process that it names


class ProbeStatus(Part, kw_only=True, frozen=True):
    name: str
    state: str = "ok"  # core.health.ProbeState
    reason: str = ""


class HealthStatus(Part, kw_only=True, frozen=True):
    """All that a node's probes say now. `epoch`: counts begin anew when it changes (the boot's id)."""

    epoch: str = ""
    gpus: tuple[GpuSample, ...] = ()
    checks: tuple[Check, ...] = ()
    faults: tuple[FaultCount, ...] = ()
    probes: tuple[ProbeStatus, ...] = ()
    fabric: dict[str, str] = {}  # cluster and clique of NVLink domains, by GPU UUID: "cluster/clique"
