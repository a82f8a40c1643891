"""Why a GPU is slower than those of its peers, by its driver: heat, power, hardware, clocks, PCIe."""

import statistics
from collections.abc import Mapping

from keepstep.core.ids import Rank
from keepstep.decide.view import Gpu

_SLOWER = 0.95  # of its peers' clock: less is no longer the spread of healthy ones
# Most GPUs under load are at their power limit now and then: power counts only where the clock is lower, too.
_REASONS = {"hardware": "the hardware", "thermal": "heat", "power": "its power limit"}


def hindrance(rank: Rank, gpus: Mapping[Rank, Gpu]) -> str:
    """What holds the rank's GPU back where it does not hold its peers' back, or ""."""
    mine = gpus.get(rank)
    peers = [gpu for other, gpu in gpus.items() if other != rank]
    if mine is None or not peers:
        return ""
    clocks = [gpu.clock_mhz for gpu in peers if gpu.clock_mhz is not None]
    usual = statistics.median(clocks) if clocks else None
    slower = mine.clock_mhz is not None and usual is not None and mine.clock_mhz < _SLOWER * usual
    at = f" at {mine.clock_mhz} MHz, where those of its peers run at {usual:.0f}" if slower else ""
    for reason, name in _REASONS.items():
        alone = not any(reason in gpu.throttled for gpu in peers)
        if reason in mine.throttled and (slower or (alone and reason != "power")):
            return f"{name} holds the clocks of its GPU {mine.index} down ({reason}){at}"
    if slower:
        return f"its GPU {mine.index} runs{at}, and its driver gives no reason (clocks)"
    lanes = max((gpu.lanes or 0 for gpu in peers), default=0)
    generation = max((gpu.generation or 0 for gpu in peers), default=0)
    if (mine.lanes or lanes) < lanes or (mine.generation or generation) < generation:
        has = f"{mine.lanes} lanes of generation {mine.generation}"
        return f"the PCIe link of its GPU {mine.index} has {has}, peers have {lanes} of {generation} (pcie)"
    return ""
