"""How fast each rank is by itself, from the sums that its agent reports: differences over the last while.

A window is at least `STEPS` steps and `SECONDS` long; what is shorter says little, and what is older than
`KEPT` reports nothing about now.
"""

from collections import deque
from dataclasses import dataclass, field

from keepstep.decide.view import Pace
from keepstep.wire.messages import RankStatus

STEPS, SECONDS, KEPT = 10, 5.0, 30


@dataclass(frozen=True, slots=True)
class _Sums:
    step: int
    at_s: float  # of the phases' clock: all that was completed, in seconds
    own_s: float
    data_s: float
    waited_s: float
    starved_s: float
    collected_s: float


@dataclass(slots=True)
class Paces:
    _seen: dict[int, deque[_Sums]] = field(default_factory=dict)
    _least: dict[int, float] = field(default_factory=dict)  # waited a step

    def hear(self, rank: RankStatus) -> None:
        if rank.passed_s is None or rank.step < 0:
            return
        now = _Sums(
            rank.step, rank.passed_s, rank.own_s, rank.data_s, rank.wait_s, rank.starved_s, rank.collected_s
        )
        seen = self._seen.setdefault(rank.rank, deque(maxlen=KEPT))
        if seen and now.step <= seen[-1].step:
            return
        seen.append(now)
        pace = self.of(rank.rank)
        if pace is not None:
            self._least[rank.rank] = min(pace.waited_s, self._least.get(rank.rank, pace.waited_s))

    def of(self, rank: int) -> Pace | None:
        seen = self._seen.get(rank)
        if not seen:
            return None
        last = seen[-1]
        first = next(
            (
                one
                for one in reversed(seen)
                if last.step - one.step >= STEPS and last.at_s - one.at_s >= SECONDS
            ),
            None,
        )
        if first is None:
            return None
        steps = last.step - first.step
        return Pace(
            step_s=(last.at_s - first.at_s) / steps,
            own_s=(last.own_s - first.own_s) / steps,
            data_s=(last.data_s - first.data_s) / steps,
            waited_s=(last.waited_s - first.waited_s) / steps,
            starved_s=(last.starved_s - first.starved_s) / steps,
            collected_s=(last.collected_s - first.collected_s) / steps,
            waited_least_s=self._least.get(rank),
        )
