"""How often a state is kept in memory: so often that it costs no more than a share of the time.

Two things take time: the copy, for which the rank stands still, and sending it to the buddy, which takes the
network and both nodes' processors while ranks compute. Measured is the least of the last few, so that what a
busy machine adds does not count; below the floors it is latency more than work, not worth a rarer snapshot.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

STALL_SHARE = 0.05  # of a rank's time, at most
SEND_SHARE = 0.5  # of the time in which copies are on their way to the buddy, at most
STALL_FLOOR_S, SEND_FLOOR_S = 0.002, 0.05
STEPS_MAX = 1000
_KEPT = 8


def interval(step_s: float, stall_s: float, send_s: float) -> int:
    """Steps from one snapshot to the next: the fewest that keep within both shares, `STEPS_MAX` at most.

    `stall_s`: of one copy. `send_s`: of all that a node sends for one snapshot of its ranks.
    """
    spaces = [
        cost_s / share
        for cost_s, share, floor_s in (
            (stall_s, STALL_SHARE, STALL_FLOOR_S),
            (send_s, SEND_SHARE, SEND_FLOOR_S),
        )
        if cost_s > floor_s
    ]
    if not spaces:
        return 1
    if step_s <= 0:
        return STEPS_MAX
    return max(1, min(STEPS_MAX, math.ceil(max(spaces) / step_s)))


def _few() -> deque[float]:
    return deque(maxlen=_KEPT)


@dataclass(slots=True)
class Costs:
    """What one rank has measured last, in seconds."""

    steps: deque[float] = field(default_factory=_few)
    stalls: deque[float] = field(default_factory=_few)
    sends: deque[float] = field(default_factory=_few)

    @property
    def interval(self) -> int:
        """1 until there is something to judge by."""
        if not self.steps:
            return 1
        return interval(
            statistics.median(self.steps), min(self.stalls, default=0.0), min(self.sends, default=0.0)
        )
