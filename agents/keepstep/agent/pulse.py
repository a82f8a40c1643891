"""Whether ranks are alive and move, looked at a few times a second: what verdicts on hangs are made from.

Stillness and process states are counted in looks by this agent's own clock, and a look that came late counts
little: whoever slept saw nothing. A state that was seen before a late look is seen anew, as if for the first
time, so that nothing that was stopped together with this agent is taken for stopped by itself.

Most of it waits for the next report. At once goes what a verdict may hang on: a process that was stopped,
traced or lost (and once more when a second look confirms it), a node whose ranks all stand still beyond a
bound of their phase (that for all gangs, or that where a node is silent), and that it goes on after all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from keepstep.agent import kernel
from keepstep.agent.rank.protocol import RankState
from keepstep.core.beacon import BeaconReader, Phase, Record
from keepstep.core.durations import (
    COMPUTING,
    COMPUTING_FLOOR_S,
    HELD_S,
    SILENT_FACTOR,
    Usual,
    added,
    bound_s,
    waiting_bound_s,
)
from keepstep.wire.messages import PhaseSeen

LATE_S = 1.0  # a look after longer than this is late
_COUNTED_MAX_S = 0.5  # the most that one look can prove
_TOLD_AGAIN_S = 3.0  # a suspicious node is reported with every look for so long
_GRAVE = frozenset({"stopped", "traced", "zombie", "gone"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Where one rank's time went, in all."""

    passed_s: float
    own_s: float
    data_s: float
    collected_s: float
    starved_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """One rank, as the last look found it."""

    counter: int = -1
    still_s: float = 0.0
    process: str = ""
    process_s: float = 0.0
    spent: Spent | None = None


@dataclass(slots=True)
class Pulses:
    ranks: dict[int, Pulse] = field(default_factory=dict)
    _suspicious: bool = False

    def look(
        self,
        states: Iterable[RankState],
        beacons: Mapping[int, BeaconReader],
        records: Mapping[int, Record],
        elapsed_s: float,
    ) -> bool:
        """True: something that should be reported at once."""
        running = [state for state in states if state.state == "running" and state.pid]
        before, self.ranks = self.ranks, {}
        urgent = False
        for state in running:
            counter = records[state.rank].sequence if state.rank in records else 0
            was = before.get(state.rank, Pulse())
            now = self.ranks[state.rank] = _felt(was, state.pid or 0, counter, elapsed_s)
            if state.rank in beacons:
                now = self.ranks[state.rank] = replace(now, spent=spent(state.pid or 0, beacons[state.rank]))
            changed = now.process != was.process or was.process_s < HELD_S <= now.process_s
            urgent = urgent or (changed and bool(_GRAVE & {now.process, was.process}))
        still_s = min((pulse.still_s for pulse in self.ranks.values()), default=0.0)
        bounds = self._bounds_s(beacons, records) if still_s >= COMPUTING_FLOOR_S else []
        was_suspicious, self._suspicious = self._suspicious, any(still_s >= each for each in bounds)
        resumed = was_suspicious and not self._suspicious
        return urgent or resumed or any(0 <= still_s - each <= _TOLD_AGAIN_S for each in bounds)

    def _bounds_s(self, beacons: Mapping[int, BeaconReader], records: Mapping[int, Record]) -> list[float]:
        """How long the whole node may stand still before somebody wants to know: the first of each kind."""
        found = []
        for rank in self.ranks:
            phase = records[rank].phase if rank in records else Phase.NONE
            if rank in beacons and (seen := beacons[rank].phases().get(phase)) is not None:
                usual = Usual.of(seen)
                found.append((bound_s(phase, usual), waiting_bound_s(phase, usual, SILENT_FACTOR)))
        kinds = ([each for each in kind if each is not None] for kind in zip(*found, strict=True))
        return [min(kind) for kind in kinds if kind]


def spent(pid: int, beacon: BeaconReader) -> Spent:
    passed = own = data = collected = 0
    for phase, seen in beacon.phases().items():
        if phase is Phase.COLLECTING:  # lies within the others
            collected = seen.total_ns
            continue
        passed += seen.total_ns
        own += seen.total_ns - seen.waited_ns if phase in COMPUTING else 0
        data += seen.total_ns - seen.waited_ns if phase is Phase.DATA else 0
    return Spent(
        passed_s=passed / 1e9, own_s=own / 1e9, data_s=data / 1e9, collected_s=collected / 1e9,
        starved_s=_starved_s(pid),
    )  # fmt: skip


def _starved_s(pid: int) -> float:
    """For how long its main thread was ready to run and did not: the second figure of schedstat."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0  # gone, or a kernel without it


def phases(beacons: Iterable[BeaconReader]) -> tuple[PhaseSeen, ...]:
    """How long each phase took, over the ranks of this node."""
    found: dict[Phase, list[Usual]] = {}
    waited_ns: dict[Phase, int] = {}
    total_ns: dict[Phase, int] = {}
    for beacon in beacons:
        for phase, seen in beacon.phases().items():
            found.setdefault(phase, []).append(Usual.of(seen))
            waited_ns[phase] = waited_ns.get(phase, 0) + seen.waited_ns
            total_ns[phase] = total_ns.get(phase, 0) + seen.total_ns
    sums = ((phase, added(parts)) for phase, parts in found.items())
    return tuple(
        PhaseSeen(
            phase=phase.name.lower(), count=usual.count, ranks=usual.origins, longest_s=usual.longest_s,
            total_s=total_ns[phase] / 1e9, waited_s=waited_ns[phase] / 1e9, bins=usual.bins,
        )
        for phase, usual in sums
    )  # fmt: skip


def bubble_s(beacons: Iterable[BeaconReader]) -> float:
    """What the ranks of this node waited for their neighbours in a pipeline."""
    return sum(beacon.bubble_ns() for beacon in beacons) / 1e9


def _felt(was: Pulse, pid: int, counter: int, elapsed_s: float) -> Pulse:
    counted_s = min(max(elapsed_s, 0.0), _COUNTED_MAX_S)
    still_s = was.still_s + counted_s if counter == was.counter else 0.0
    process = _state(pid, look_closer=still_s > _COUNTED_MAX_S)
    same = process == was.process and elapsed_s <= LATE_S
    now = Pulse(counter=counter, still_s=still_s, process=process)
    return replace(now, process_s=was.process_s + counted_s) if same else now


def _state(pid: int, *, look_closer: bool) -> str:
    """A stopped process under a debugger is not stopped by mistake: where it matters, one looks closer."""
    process = kernel.process_of(pid)
    if process == "stopped" or (look_closer and process not in {"gone", "zombie"}):
        return kernel.standing_of(pid).process
    return process
