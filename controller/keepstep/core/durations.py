"""How long a phase usually takes, and from when on it takes suspiciously long.

The bound is made of what was seen, the completions of all ranks added up in the bins of `core.beacon`:

    bound = floor + 8 x usual longest x (1 + 50 / completions of each rank)

The usual longest is a quantile so high that only oddities lie above it: two completions of each rank and
attempt (the first step loads, compiles and allocates; so may one more) and one in ten thousand of the rest.
What happens a third time is usual. Eight times, because batches differ in length, phases drift and machines
are shared, all by factors; and more than that while only a few completions are known.

The floor is for what no history can show: a rank that the kernel does not run for a moment. Computing, 1.5 s
is longer than a busy machine withholds its processors; phases that speak to storage, to a network or to
other programs stall for longer without being hung, so theirs is a minute, and so is that of a collective
which everybody has begun: links flap and come back.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from keepstep.core.beacon import BINS, Phase, Seen, bin_edge_s

COMPUTING_FLOOR_S, OUTSIDE_FLOOR_S, FACTOR = 1.5, 60.0, 8.0
# Of a gang with a silent node. The full factor is for what makes a rank late: long batches, drifting phases,
# shared machines. None of that keeps its agent from speaking at the same time; so where the agent is silent,
# too, twice is enough.
SILENT_FACTOR = 2.0
COMPUTING = frozenset({Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER})
UNKNOWN = frozenset({Phase.NONE, Phase.UNKNOWN})  # what a rank does there is anybody's guess
HELD_S = 0.2  # a process state is a fact when two looks saw it, at least so far apart
SEEN_MIN = 5  # completions by each rank before a phase counts as known
_ODDITIES, _RARE, _FEW = 2, 10_000, 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """Completions of one phase, added up over `origins` ranks and attempts."""

    count: int = 0
    origins: int = 0
    longest_s: float = 0.0
    bins: tuple[int, ...] = ()

    @classmethod
    def of(cls, seen: Seen) -> "Usual":
        return cls(count=seen.count, origins=1, longest_s=seen.longest_ns / 1e9, bins=seen.bins)

    @property
    def known(self) -> bool:
        return self.origins > 0 and self.count >= SEEN_MIN * self.origins

    @property
    def high_s(self) -> float:
        """The usual longest: the upper edge of a bin, or what was longest where that says less."""
        above, oddities = 0, _ODDITIES * self.origins + sum(self.bins) // _RARE
        for k in range(len(self.bins) - 1, -1, -1):
            above += self.bins[k]
            if above > oddities:
                return min(bin_edge_s(k), self.longest_s)
        return 0.0

    def __add__(self, other: "Usual") -> "Usual":
        return added((self, other))


def phase_of(name: str) -> Phase:
    """By its name in reports; what an older or newer version does not know is unknown."""
    return Phase[name.upper()] if name.upper() in Phase.__members__ else Phase.UNKNOWN


def added(parts: Iterable[Usual]) -> Usual:
    count = origins = 0
    longest_s = 0.0
    bins = [0] * BINS
    for part in parts:
        count, origins = count + part.count, origins + part.origins
        longest_s = max(longest_s, part.longest_s)
        for k, each in enumerate(part.bins[:BINS]):
            bins[k] += each
    return Usual(count=count, origins=origins, longest_s=longest_s, bins=tuple(bins))


def bound_s(phase: Phase, usual: Usual, *, outside: bool = False) -> float | None:
    """When a rank without any progress in this phase is suspicious; None: nothing can be said of it.

    `outside`: what it waits for is no rank.
    """
    if phase in UNKNOWN or not usual.known:
        return None
    floor_s = COMPUTING_FLOOR_S if phase in COMPUTING and not outside else OUTSIDE_FLOOR_S
    return floor_s + _allowed_s(usual, FACTOR)


def waiting_bound_s(phase: Phase, usual: Usual, factor: float) -> float | None:
    """The same of a rank that waits for other ranks, whatever else it does in this phase at other times.

    `factor`: less than the full one where evidence of another kind says the same; the less a verdict hangs
    on the history, the less of it is needed, too.
    """
    known = phase not in UNKNOWN and usual.known
    return COMPUTING_FLOOR_S + _allowed_s(usual, factor) if known else None


def _allowed_s(usual: Usual, factor: float) -> float:
    few = _FEW * factor / FACTOR
    return factor * usual.high_s * (1.0 + few * usual.origins / usual.count)
