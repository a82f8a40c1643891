"""Where a gang's time goes: the phases of a step, and what of them was waiting for other ranks.

From what agents report of all their ranks since the attempt began. Waiting for neighbours in a pipeline is
its bubble; the rest is communication that no computing covers, and whoever is late in it.
"""

from collections.abc import Iterable

from keepstep.wire.messages import PhaseSeen

STEP = ("data", "forward", "backward", "optimizer")


def shares(phases: Iterable[PhaseSeen], bubble_s: float) -> dict[str, float]:
    """Of the time in steps, by what it was spent on: they add up to 1. Empty where nothing is known."""
    own_s, waited_s = dict.fromkeys(STEP, 0.0), 0.0
    for seen in phases:
        if seen.phase in own_s:
            own_s[seen.phase] += seen.total_s - seen.waited_s
            waited_s += seen.waited_s
    bubble_s = min(bubble_s, waited_s)  # it may have been read a moment later
    parts = own_s | {"communication": waited_s - bubble_s, "bubble": bubble_s}
    total_s = sum(parts.values())
    return {part: spent_s / total_s for part, spent_s in parts.items()} if total_s > 0 else {}
