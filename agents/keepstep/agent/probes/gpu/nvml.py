"""NVML asked through pynvml, in the sampling process only: nothing else of the agent loads the binding.

Errors are matched by value. What a driver or a GPU does not have is asked once per GPU and then left out; a
GPU that is lost ends its own pass and nobody else's. Field values are read into arrays that are built once.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pynvml

from keepstep.agent.probes.gpu import catalogue
from keepstep.agent.probes.gpu.catalogue import Tier
from keepstep.agent.probes.gpu.page import NO_GPU, PASS, Page
from keepstep.agent.probes.gpu.reading import (
    Activity,
    Ecc,
    Fabric,
    Fast,
    Heat,
    Identity,
    Links,
    Order,
    Part,
    Pcie,
    Reading,
    Rows,
    pci_address,
)  # fmt: skip
from keepstep.core.clock import Clock

_VALUE = struct.Struct("<IIqqII8s")  # c_nvmlFieldValue_t
_DECODE: dict[int, Callable[[bytes], Any]] = {
    0: lambda raw: struct.unpack("<d", raw)[0],
    1: lambda raw: int.from_bytes(raw[:4], "little"),
    4: lambda raw: int.from_bytes(raw, "little", signed=True),
    5: lambda raw: int.from_bytes(raw[:4], "little", signed=True),
    6: lambda raw: int.from_bytes(raw[:2], "little"),
}


class Lost(Exception):
    """Nothing about this GPU is answered; `args` is NVML's error."""


class Fields:
    """Field values of one GPU in a prebuilt array. What it does not have is dropped after the first try."""

    def __init__(self, wanted: Sequence[tuple[int, int]]) -> None:
        self._build(list(wanted))

    def _build(self, wanted: list[tuple[int, int]]) -> None:
        self.wanted = wanted
        self.array = (pynvml.c_nvmlFieldValue_t * len(wanted))()
        for slot, (field, scope) in zip(self.array, wanted, strict=True):
            slot.fieldId, slot.scopeId = field, scope
        self._view = memoryview(self.array).cast("B")

    def values(self) -> list[tuple[int, int, Any]]:
        """(field, scope, value) of what was answered."""
        found, never = [], set()
        for field, scope, _, _, kind, error, raw in _VALUE.iter_unpack(self._view):
            if error == 0:
                read = _DECODE.get(kind)
                found.append((field, scope, int.from_bytes(raw, "little") if read is None else read(raw)))
            elif error in catalogue.NEVER:
                never.add((field, scope))
        if never:
            self._build([each for each in self.wanted if each not in never])
        return found


class Gpu:
    """One GPU, from its handle to a reading."""

    def __init__(self, identity: Identity, handle: Any, page: Page, clock: Clock) -> None:
        self.reading = Reading(identity)
        self.handle = handle
        self._page, self._clock = page, clock
        self._never: set[str] = set()  # calls that this driver or GPU does not have
        self._fields: dict[Tier, Fields] = {}
        self._gpm: list[Any] = []
        self._metrics: Any = None
        self._measured_at: float | None = None
        self._sample: dict[Tier, Callable[[float], Part | None]] = {
            Tier.FAST: self._fast, Tier.HEAT: self._heat, Tier.ACTIVITY: self._activity, Tier.ECC: self._ecc,
            Tier.LINKS: self._links, Tier.ROWS: self._rows, Tier.PCIE: self._pcie, Tier.FABRIC: self._fabric,
        }  # fmt: skip

    def sample(self, tiers: Sequence[Tier]) -> Reading:
        """Read these anew; what was read before stays."""
        self.reading.error = 0
        try:
            for tier in tiers:
                setattr(self.reading, tier, self._sample[tier](self._clock.monotonic()))
        except Lost as lost:
            self.reading.error = lost.args[0]
        return self.reading

    def ask(self, call: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None where there is none. Errors: Lost."""
        if call in self._never:
            return None
        reading = self.reading
        self._page.enter(PASS, reading.gpu.index, call, self._clock.monotonic())
        try:
            answer = function(self.handle, *arguments)
        except pynvml.NVMLError as error:
            if error.value in catalogue.ENDS_THE_PASS:
                raise Lost(error.value) from error
            if error.value in catalogue.NEVER:
                self._never.add(call)
            else:
                reading.failing[call] = error.value
            return None
        if reading.failing:
            reading.failing.pop(call, None)
        return answer

    def _values(
        self, tier: Tier, wanted: Callable[[], Sequence[tuple[int, int]]]
    ) -> list[tuple[int, int, Any]]:
        fields = self._fields.get(tier)
        if fields is None:
            fields = self._fields[tier] = Fields(wanted())
        if not fields.wanted:
            return []
        read = self.ask(f"nvmlDeviceGetFieldValues({tier})", _field_values, fields)
        return [] if read is None else fields.values()

    def _plain(self, tier: Tier, fields: Sequence[int]) -> dict[int, Any]:
        return {field: value for field, _, value in self._values(tier, lambda: [(f, 0) for f in fields])}

    # ---------------------------------------------------------------- tiers

    def _fast(self, at: float) -> Fast:
        rates = self.ask("nvmlDeviceGetUtilizationRates", pynvml.nvmlDeviceGetUtilizationRates)
        memory = self.ask("nvmlDeviceGetMemoryInfo", pynvml.nvmlDeviceGetMemoryInfo)
        clock = pynvml.nvmlDeviceGetClockInfo
        reasons = self.ask(
            "nvmlDeviceGetCurrentClocksEventReasons", pynvml.nvmlDeviceGetCurrentClocksEventReasons
        )
        if reasons is None:  # its name before driver 535
            reasons = self.ask(
                "nvmlDeviceGetCurrentClocksThrottleReasons", pynvml.nvmlDeviceGetCurrentClocksThrottleReasons
            )
        found = self._plain(Tier.FAST, catalogue.FAST_FIELDS)
        power = found.get(catalogue.POWER_INSTANT, found.get(catalogue.POWER_AVERAGE))
        if power is None:
            power = self.ask("nvmlDeviceGetPowerUsage", pynvml.nvmlDeviceGetPowerUsage)
        return Fast(
            at=at,
            utilisation=None if rates is None else rates.gpu,
            memory_utilisation=None if rates is None else rates.memory,
            memory_used=None if memory is None else memory.used,
            memory_total=None if memory is None else memory.total,
            sm_clock=self.ask("nvmlDeviceGetClockInfo(SM)", clock, pynvml.NVML_CLOCK_SM),
            memory_clock=self.ask("nvmlDeviceGetClockInfo(memory)", clock, pynvml.NVML_CLOCK_MEM),
            reasons=reasons,
            policies={field: found[field] for field in catalogue.POLICY_FIELDS if field in found},
            power_w=None if power is None else power / 1000,
            energy_mj=found.get(catalogue.ENERGY),
        )

    def _heat(self, at: float) -> Heat:
        temperature = self.ask("nvmlDeviceGetTemperatureV", pynvml.nvmlDeviceGetTemperatureV, 0)
        if temperature is None:  # before driver 570; it goes away in turn with CUDA 14
            temperature = self.ask("nvmlDeviceGetTemperature", pynvml.nvmlDeviceGetTemperature, 0)
        margin = self.ask("nvmlDeviceGetMarginTemperature", pynvml.nvmlDeviceGetMarginTemperature)
        threshold = pynvml.nvmlDeviceGetTemperatureThreshold
        found = self._plain(Tier.HEAT, catalogue.HEAT_FIELDS)
        return Heat(
            at=at,
            temperature=temperature,
            margin=margin,
            slowdown_limit=found.get(catalogue.SLOWDOWN_LIMIT),
            slowdown=self.ask("nvmlDeviceGetTemperatureThreshold(slowdown)", threshold, 1),
            memory_temperature=found.get(catalogue.MEMORY_TEMPERATURE) or None,  # 0: it has no such sensor
            memory_max=self.ask("nvmlDeviceGetTemperatureThreshold(memory)", threshold, 2),
            recovery_action=found.get(catalogue.RECOVERY_ACTION),
        )

    def _activity(self, at: float) -> Activity | None:
        if not self._gpm:
            support = self.ask("nvmlGpmQueryDeviceSupport", pynvml.nvmlGpmQueryDeviceSupport)
            if support is None or not support.isSupportedDevice:
                self._never.add("nvmlGpmQueryDeviceSupport")
                return None
            self._gpm = [pynvml.nvmlGpmSampleAlloc() for _ in range(2)]
            self._metrics = pynvml.c_nvmlGpmMetricsGet_t(
                version=pynvml.NVML_GPM_METRICS_GET_VERSION, numMetrics=len(catalogue.GPM_METRICS)
            )
            for slot, metric in zip(self._metrics.metrics, catalogue.GPM_METRICS, strict=False):
                slot.metricId = metric
        before, self._measured_at = self._measured_at, None
        if self.ask("nvmlGpmSampleGet", pynvml.nvmlGpmSampleGet, self._gpm[1]) is None:
            return None
        self._measured_at = at
        measured = None
        if before is not None and at - before > catalogue.GPM_APART_S:
            measured = self._measured(at)
        self._gpm.reverse()
        return measured

    def _measured(self, at: float) -> Activity | None:
        self._metrics.sample1, self._metrics.sample2 = self._gpm
        if self.ask("nvmlGpmMetricsGet", lambda _, m: pynvml.nvmlGpmMetricsGet(m), self._metrics) is None:
            return None
        slots = self._metrics.metrics[: len(catalogue.GPM_METRICS)]
        return Activity(at, *(slot.value / 100 if slot.nvmlReturn == 0 else None for slot in slots))

    def _ecc(self, at: float) -> Ecc:
        found = self._plain(Tier.ECC, catalogue.ECC_FIELDS)
        sram = self.ask("nvmlDeviceGetSramEccErrorStatus", _sram)
        correctable, uncorrectable = found.get(catalogue.SBE), found.get(catalogue.DBE)
        if sram is not None:
            correctable = (correctable or 0) + sram.volatileCor
            uncorrectable = (uncorrectable or 0) + sram.volatileUncParity + sram.volatileUncSecDed
        return Ecc(at=at, correctable=correctable, uncorrectable=uncorrectable)

    def _rows(self, at: float) -> Rows:
        found = self._plain(Tier.ROWS, catalogue.ROW_FIELDS)
        return Rows(at, *(found.get(field) for field in catalogue.ROW_FIELDS))

    def _links(self, at: float) -> Links:
        found = self._values(Tier.LINKS, _link_fields)
        states = [value for field, _, value in found if field == catalogue.LINK_STATE]
        errors = [value for field, _, value in found if field in catalogue.LINK_ERRORS]
        kib = [value for field, _, value in found if field in {catalogue.LINK_TX, catalogue.LINK_RX}]
        return Links(
            at=at,
            up=sum(map(bool, states)) if states else None,
            total=len(states) or None,
            errors=sum(errors) if errors else None,
            kib=sum(kib) if kib else None,
        )

    def _pcie(self, at: float) -> Pcie:
        found = self._plain(Tier.PCIE, catalogue.PCIE_FIELDS)
        errors = [found[field] for field in catalogue.PCIE_ERRORS if field in found]
        return Pcie(
            at=at,
            width=self.ask("nvmlDeviceGetCurrPcieLinkWidth", pynvml.nvmlDeviceGetCurrPcieLinkWidth),
            generation=self.ask(
                "nvmlDeviceGetCurrPcieLinkGeneration", pynvml.nvmlDeviceGetCurrPcieLinkGeneration
            ),
            width_max=self.ask("nvmlDeviceGetMaxPcieLinkWidth", pynvml.nvmlDeviceGetMaxPcieLinkWidth),
            generation_max=self.ask(
                "nvmlDeviceGetMaxPcieLinkGeneration", pynvml.nvmlDeviceGetMaxPcieLinkGeneration
            ),
            replays=found.get(catalogue.PCIE_REPLAYS),
            errors=sum(errors) if errors else None,
            tx=found.get(catalogue.PCIE_TX),
            rx=found.get(catalogue.PCIE_RX),
        )

    def _fabric(self, at: float) -> Fabric | None:
        info = self.ask("nvmlDeviceGetGpuFabricInfoV(3)", _fabric_info, pynvml.c_nvmlGpuFabricInfo_v3_t)
        if info is None:
            info = self.ask("nvmlDeviceGetGpuFabricInfoV(2)", _fabric_info, pynvml.c_nvmlGpuFabricInfo_v2_t)
        if info is None or info.state == catalogue.FABRIC_NOT_SUPPORTED:
            return None
        return Fabric(
            at=at, state=info.state, status=info.status, summary=getattr(info, "healthSummary", 0),
            cluster=bytes(info.clusterUuid).hex(), clique=info.cliqueId,
        )  # fmt: skip


def opened(order: Order, page: Page, clock: Clock) -> tuple[list[Gpu], dict[int, int]]:
    """The GPUs that this process is to sample, and NVML's error of those that cannot be opened, by index.

    With `order.known` each is opened by its address, so that one that hangs is not even touched.
    """
    if order.known:
        places = [(known, known.pci) for known in order.known]
    else:
        places = [(Identity(index), "") for index in range(pynvml.nvmlDeviceGetCount())]
    places = [(gpu, pci) for gpu, pci in places if not {gpu.uuid, str(gpu.index)} & {*order.left_out}]
    found: list[Gpu] = []
    errors: dict[int, int] = {}
    for identity, pci in places:
        index = identity.index
        gpu = Gpu(identity, None, page, clock)
        try:
            if pci:
                handle = _strictly(
                    gpu, "nvmlDeviceGetHandleByPciBusId",
                    lambda _, pci=pci: pynvml.nvmlDeviceGetHandleByPciBusId(pci.encode()),
                )  # fmt: skip
            else:
                handle = _strictly(
                    gpu, "nvmlDeviceGetHandleByIndex",
                    lambda _, index=index: pynvml.nvmlDeviceGetHandleByIndex(index),
                )  # fmt: skip
            gpu.handle = handle
            if not pci:
                gpu.reading.gpu = _identity(gpu, index)
        except Lost as lost:
            errors[index] = lost.args[0]
            continue
        mine = gpu.reading.gpu
        if not order.only or mine.uuid in order.only or str(index) in order.only:
            found.append(gpu)
    page.leave(PASS)
    return found, errors


def start(page: Page, clock: Clock) -> tuple[str, str]:
    """Load NVML; driver and NVML version. Errors: pynvml.NVMLError."""
    page.enter(PASS, NO_GPU, "nvmlInit", clock.monotonic())
    pynvml.nvmlInit()
    page.leave(PASS)
    return text(pynvml.nvmlSystemGetDriverVersion()), text(pynvml.nvmlSystemGetNVMLVersion())


def _identity(gpu: Gpu, index: int) -> Identity:
    uuid = text(_strictly(gpu, "nvmlDeviceGetUUID", pynvml.nvmlDeviceGetUUID))
    pci = pci_address(text(_strictly(gpu, "nvmlDeviceGetPciInfo", pynvml.nvmlDeviceGetPciInfo).busId))
    name = gpu.ask("nvmlDeviceGetName", pynvml.nvmlDeviceGetName)
    return Identity(index=index, uuid=uuid, pci=pci, name="" if name is None else text(name))


def _strictly(gpu: Gpu, call: str, function: Callable[..., Any]) -> Any:
    """As `ask`, where nothing goes on without the answer. Errors: Lost."""
    answer = gpu.ask(call, function)
    if answer is None:
        raise Lost(gpu.reading.failing.get(call, catalogue.NOT_SUPPORTED))
    return answer


def _field_values(handle: Any, fields: Fields) -> bool:
    """pynvml's own form builds the array anew at every call."""
    function = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetFieldValues")
    pynvml._nvmlCheckReturn(function(handle, ctypes.c_int32(len(fields.wanted)), fields.array))
    return True


def _link_fields() -> list[tuple[int, int]]:
    return [
        *((field, link) for link in range(catalogue.LINKS_MAX) for field in catalogue.LINK_FIELDS),
        (catalogue.LINK_TX, catalogue.ALL_LINKS),
        (catalogue.LINK_RX, catalogue.ALL_LINKS),
    ]


def _sram(handle: Any) -> Any:
    status = pynvml.c_nvmlEccSramErrorStatus_v1_t()
    pynvml.nvmlDeviceGetSramEccErrorStatus(handle, ctypes.byref(status))
    return status


def _fabric_info(handle: Any, form: Callable[[], Any]) -> Any:
    info = form()
    pynvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info))
    return info


def text(answer: Any) -> str:
    return answer.decode(errors="replace") if isinstance(answer, bytes) else str(answer)
