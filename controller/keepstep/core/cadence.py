"""How often a state is kept: in memory, so often that it costs no more than a share of the time; in storage,
by Young's rule, from what saving costs and how often such a gang was stopped.

In memory, two things take time: the copy, for which the rank stands still, and sending it to the buddy, which
takes the network and both nodes' processors while ranks compute. Measured is the least of the last few, so
that what a busy machine adds does not count; below the floors it is latency more than work, not worth a rarer
snapshot.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

STALL_SHARE = 0.05  # of a rank's time, at most
SEND_SHARE = 0.5  # of the time in which copies are on their way to the buddy, at most
STALL_FLOOR_S, SEND_FLOOR_S = 0.002, 0.05
STEPS_MAX = 1000
SAVE_MIN_S, SAVE_MAX_S = 60.0, 3600.0  # from one checkpoint in storage to the next
_KEPT = 8
# Before a job has a history of its own: Llama 3 405B was stopped 419 times in 54 days on 16,384 GPUs.
_GPU_S_A_FAILURE = 54 * 86_400 * 16_384 / 419


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


def mtbf_s(gpus: int, failures: int, ran_s: float) -> float:
    """Seconds from one failure of such a gang to the next: what is published, and what this job has seen."""
    return (_GPU_S_A_FAILURE + gpus * ran_s) / (1 + failures) / gpus


def save_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Between checkpoints in storage, each of which holds training up for `cost_s` (Young, 1974)."""
    return min(SAVE_MAX_S, max(SAVE_MIN_S, math.sqrt(2 * cost_s * mtbf_s)))


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
