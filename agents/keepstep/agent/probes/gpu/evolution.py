"""From readings to samples and checks: one GPU's past, its newest reading, and what is not well. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from keepstep.agent.probes.gpu import catalogue
from keepstep.agent.probes.gpu.reading import Fast, Heat, Identity, Pcie, Reading
from keepstep.agent.probes.gpu.thresholds import Thresholds
from keepstep.agent.probes.rates import Rate
from keepstep.agent.probes.standing import check
from keepstep.core.health import Level
from keepstep.wire.health import Check, GpuSample

_HOUR_S, _MINUTE_S = 3600.0, 60.0


@dataclass(slots=True)
class Past:
    """What one reading alone does not say."""

    throttled: dict[str, float] = field(default_factory=dict)  # reason -> last seen
    policies: dict[int, int] = field(default_factory=dict)
    ecc: Rate = field(default_factory=lambda: Rate(_HOUR_S))
    links: Rate = field(default_factory=lambda: Rate(_MINUTE_S))
    replays: Rate = field(default_factory=lambda: Rate(_MINUTE_S))
    tx: Rate = field(default_factory=lambda: Rate(_MINUTE_S))
    rx: Rate = field(default_factory=lambda: Rate(_MINUTE_S))
    links_up: int = 0  # the most that were seen
    failing: dict[str, int] = field(default_factory=dict)  # call -> passes in a row
    asked: tuple[int, float] | None = None  # a recovery action that an event told, and when


@dataclass(frozen=True, slots=True)
class Hung:
    """A GPU that a driver call never came back about."""

    call: str
    since: float


class Evolution:
    """All GPUs of a node."""

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._thresholds = thresholds or Thresholds()
        self._past: dict[str, Past] = {}
        self.readings: dict[str, Reading] = {}  # the newest, by UUID

    def take(self, readings: Iterable[Reading]) -> None:
        for reading in readings:
            uuid = reading.gpu.uuid
            past = self._past.setdefault(uuid, Past())
            before = self.readings.get(uuid)
            self.readings[uuid] = reading
            for call in reading.failing:
                past.failing[call] = past.failing.get(call, 0) + 1
            past.failing = {call: n for call, n in past.failing.items() if call in reading.failing}
            self._grow(past, reading, before)

    def asked(self, uuid: str, action: int, at: float) -> None:
        """An event told which action the driver asks for; field 230 is read only every few seconds."""
        self._past.setdefault(uuid, Past()).asked = action, at

    def _grow(self, past: Past, reading: Reading, before: Reading | None) -> None:
        fast = reading.fast
        if fast is not None and (before is None or before.fast is None or fast.at > before.fast.at):
            for reason in _reasons(fast, past.policies):
                past.throttled[reason] = fast.at
            past.policies = fast.policies
        if reading.ecc is not None:
            past.ecc.take(reading.ecc.at, reading.ecc.correctable)
        if reading.links is not None:
            past.links.take(reading.links.at, reading.links.errors)
            past.links_up = max(past.links_up, reading.links.up or 0)
        if reading.pcie is not None:
            past.replays.take(reading.pcie.at, reading.pcie.replays)
            past.tx.take(reading.pcie.at, reading.pcie.tx)
            past.rx.take(reading.pcie.at, reading.pcie.rx)

    # ---------------------------------------------------------------- what is told

    def samples(self, now: float) -> tuple[GpuSample, ...]:
        ordered = sorted(self.readings.values(), key=lambda reading: reading.gpu.index)
        return tuple(
            _sample(reading, self._past[reading.gpu.uuid], self._action(reading), now) for reading in ordered
        )

    def pcie_bytes_per_s(self, uuid: str) -> tuple[float | None, float | None]:
        past = self._past.get(uuid)
        return (None, None) if past is None else (past.tx.per_s, past.rx.per_s)

    def fabric(self) -> dict[str, str]:
        return {
            uuid: f"{reading.fabric.cluster}/{reading.fabric.clique}"
            for uuid, reading in self.readings.items()
            if reading.fabric is not None and int(reading.fabric.cluster or "0", 16)
        }

    def checks(self, now: float, known: Iterable[Identity], errors: dict[int, int]) -> Iterator[Check]:
        """`known`: the GPUs that this node had. `errors`: of those that could not be opened, by index."""
        names = {reading.gpu.name for reading in self.readings.values()}
        most_links = {
            name: max(self._past[r.gpu.uuid].links_up for r in self.readings.values() if r.gpu.name == name)
            for name in names
        }
        for uuid, reading in self.readings.items():
            past = self._past[uuid]
            yield from self._of_one(uuid, reading, past, now, most_links[reading.gpu.name])
        for gpu in known:
            error = errors.get(gpu.index, 0)
            if error and gpu.uuid not in self.readings:
                yield _lost(gpu.uuid, error)

    def failing(self) -> str:
        """Calls that should work and keep failing, for the probe's own state; "" where there are none."""
        most = self._thresholds.failing_passes
        found = {
            f"{call} of GPU {self.readings[uuid].gpu.index} (error {self.readings[uuid].failing[call]})"
            for uuid, past in self._past.items()
            for call, passes in past.failing.items()
            if passes >= most
        }
        return "" if not found else "it does not answer: " + ", ".join(sorted(found)[:4])

    def _of_one(self, uuid: str, reading: Reading, past: Past, now: float, links: int) -> Iterator[Check]:
        limits = self._thresholds
        if reading.error and reading.error != catalogue.RESET_REQUIRED:
            yield _lost(uuid, reading.error)
            return
        action = self._action(reading)
        if reading.error == catalogue.RESET_REQUIRED:
            action = action or 1
        if action:
            what = catalogue.RECOVERY_ACTIONS.get(action, "an action that this version does not know: drain")
            yield check("gpu.recovery_action", uuid, Level.BAD, action, 0, f"the driver asks: {what}")
        if reading.heat is not None:
            yield from _heat(uuid, reading.heat, limits)
        reasons = [r for r in _throttled(past, now, limits.throttled_s) if r in {"thermal", "hardware"}]
        if reasons:
            yield check(
                "gpu.throttled", uuid, Level.WARN, len(reasons), None,
                f"clocks are held down: {', '.join(reasons)}",
            )  # fmt: skip
        if reading.ecc is not None:
            bad = reading.ecc.uncorrectable
            if bad:
                yield check(
                    "gpu.ecc_uncorrectable", uuid, Level.BAD, bad, 0, f"{bad} since the driver was loaded"
                )
            if past.ecc.grown > limits.ecc_correctable_per_h:
                yield check(
                    "gpu.ecc_correctable", uuid, Level.WARN, past.ecc.grown, limits.ecc_correctable_per_h,
                    f"{past.ecc.grown:.0f} within the last hour",
                )  # fmt: skip
        if reading.rows is not None and reading.rows.pending:
            yield check("gpu.row_remap_pending", uuid, Level.WARN, 1, 0, "it takes effect at a reset")
        if reading.rows is not None and reading.rows.failed:
            yield check("gpu.row_remap_failed", uuid, Level.BAD, 1, 0, "no spare rows are left")
        yield from _links(uuid, reading, past, limits, links)
        if reading.fabric is not None:
            yield from _fabric(uuid, reading)

    def _action(self, reading: Reading) -> int | None:
        """What was told last, by field or by event."""
        heat, past = reading.heat, self._past.get(reading.gpu.uuid)
        asked = past.asked if past is not None else None
        if asked is not None and (heat is None or heat.recovery_action is None or heat.at < asked[1]):
            return asked[0]
        return None if heat is None else heat.recovery_action


def hung_checks(hung: dict[str, Hung], now: float) -> Iterator[Check]:
    for uuid, stuck in hung.items():
        yield check(
            "gpu.hung", uuid, Level.BAD, round(now - stuck.since, 1), None,
            f"{stuck.call} did not come back; this GPU is left out and tried again now and then",
        )  # fmt: skip


def missing_check(known: int, present: int, absent: Iterable[Identity]) -> Iterator[Check]:
    """`known`: as many as this node had when it was healthy."""
    if present < known:
        names = ", ".join(f"{gpu.index} ({gpu.uuid}, {gpu.pci})" for gpu in absent)
        yield check(
            "gpu.missing",
            "",
            Level.BAD,
            present,
            known,
            f"{present} of {known} GPUs are here" + (f"; not {names}" if names else ""),
        )


def _lost(uuid: str, error: int) -> Check:
    return check(
        "gpu.lost", uuid, Level.BAD, error, None, f"the driver does not reach it (NVML error {error})"
    )


def _sample(reading: Reading, past: Past, action: int | None, now: float) -> GpuSample:
    fast, heat = reading.fast or Fast(at=now), reading.heat or Heat(at=now)
    activity, pcie = reading.activity, reading.pcie or Pcie(at=now)
    return GpuSample(
        uuid=reading.gpu.uuid,
        index=reading.gpu.index,
        pci=reading.gpu.pci,
        name=reading.gpu.name,
        utilisation=fast.utilisation,
        sm_active=None if activity is None else activity.sm,
        tensor_active=None if activity is None else activity.tensor,
        memory_used_bytes=fast.memory_used,
        memory_total_bytes=fast.memory_total,
        sm_clock_mhz=fast.sm_clock,
        memory_clock_mhz=fast.memory_clock,
        throttled=tuple(_throttled(past, fast.at, 2.0)),
        power_w=fast.power_w,
        energy_j=None if fast.energy_mj is None else fast.energy_mj / 1000,
        temperature_c=heat.temperature,
        memory_temperature_c=heat.memory_temperature,
        pcie_width=pcie.width,
        pcie_generation=pcie.generation,
        recovery_action=action,
        age_s=round(max(0.0, now - fast.at), 3),
    )


def _reasons(fast: Fast, before: dict[int, int]) -> set[str]:
    """By the bits of this moment, and by counters that have grown since the last one."""
    bits = fast.reasons or 0
    found = {name for mask, name in catalogue.THROTTLE_REASONS if bits & mask}
    if bits & catalogue.HARDWARE_THERMAL and not bits & 0x80:
        found.discard("hardware")
    for fields, name in (
        ((catalogue.THERMAL_POLICY, catalogue.SW_THERMAL, catalogue.HW_THERMAL), "thermal"),
        ((catalogue.POWER_POLICY,), "power"),
        ((catalogue.POWER_BRAKE,), "hardware"),
    ):
        if any(field in before and fast.policies.get(field, 0) > before[field] for field in fields):
            found.add(name)
    return found


def _throttled(past: Past, now: float, within_s: float) -> list[str]:
    return sorted(reason for reason, at in past.throttled.items() if now - at <= within_s)


def _heat(uuid: str, heat: Heat, limits: Thresholds) -> Iterator[Check]:
    slowdown: float | None = heat.slowdown
    if heat.temperature is not None and heat.margin is not None and heat.slowdown_limit is not None:
        slowdown = heat.temperature + heat.margin - heat.slowdown_limit
    if heat.temperature is not None and slowdown is not None:
        near = heat.temperature - slowdown + limits.slowdown_near_c
        if near >= 0:
            level = Level.BAD if heat.temperature >= slowdown else Level.WARN
            text = f"{heat.temperature} °C; it slows down at {slowdown:.0f}"
            yield check("gpu.temperature", uuid, level, heat.temperature, slowdown, text)
    hottest = heat.memory_max or limits.memory_c
    if heat.memory_temperature is not None and heat.memory_temperature >= hottest:
        text = f"its memory has {heat.memory_temperature} °C, and may have {hottest:.0f}"
        yield check("gpu.memory_temperature", uuid, Level.WARN, heat.memory_temperature, hottest, text)


def _links(uuid: str, reading: Reading, past: Past, limits: Thresholds, most_up: int) -> Iterator[Check]:
    if past.links.grown > limits.nvlink_errors_per_min:
        yield check(
            "gpu.nvlink_errors", uuid, Level.WARN, past.links.grown, limits.nvlink_errors_per_min,
            f"{past.links.grown:.0f} within a minute",
        )  # fmt: skip
    links = reading.links
    if links is not None and links.up is not None and links.up < most_up:
        text = f"{links.up} of {most_up} NVLinks are up"
        yield check("gpu.nvlink_down", uuid, Level.BAD, most_up - links.up, 0, text)
    if past.replays.grown > limits.pcie_replays_per_min:
        yield check(
            "gpu.pcie_replays", uuid, Level.WARN, past.replays.grown, limits.pcie_replays_per_min,
            f"{past.replays.grown:.0f} within a minute",
        )  # fmt: skip
    pcie, fast = reading.pcie, reading.fast
    if pcie is None or pcie.width is None or pcie.width_max is None:
        return
    busy = fast is not None and (fast.utilisation or 0) >= limits.busy_percent
    slow = busy and (pcie.generation or 0) < (pcie.generation_max or 0)
    if pcie.width < pcie.width_max or slow:
        now, best = f"x{pcie.width} gen {pcie.generation}", f"x{pcie.width_max} gen {pcie.generation_max}"
        text = f"its link is {now}, and can be {best}"
        yield check("gpu.pcie_width", uuid, Level.WARN, pcie.width, pcie.width_max, text)


def _fabric(uuid: str, reading: Reading) -> Iterator[Check]:
    fabric = reading.fabric
    assert fabric is not None
    if fabric.state == catalogue.FABRIC_IN_PROGRESS:
        yield check("gpu.fabric", uuid, Level.WARN, fabric.state, None, "its fabric is being set up")
    elif fabric.state != catalogue.FABRIC_COMPLETED or fabric.status:
        text = f"state {fabric.state}, NVML error {fabric.status}"
        yield check("gpu.fabric", uuid, Level.BAD, fabric.state, None, text)
    elif fabric.summary == catalogue.FABRIC_UNHEALTHY:
        yield check("gpu.fabric", uuid, Level.BAD, fabric.state, None, "the fabric manager says: unhealthy")
