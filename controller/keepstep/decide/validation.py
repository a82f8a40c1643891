"""What the results of a validation say of a node, or of a pair of nodes.

A checksum that differs is proof, from its reference, from the node's other devices, or from what most other
nodes of the same kind gave. Slow is a comparison with the fleet, as it was measured before: without a history
nobody is slow. What is usual follows from how far the fleet's own figures lie apart: six robust standard
deviations (of the median absolute deviation) behind the median is what one of 10^9 good nodes would be.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from keepstep.core.validation import TRAINING, Outcome, Result

_NORMAL = 1.4826  # median absolute deviations that are one standard deviation


class Verdict(StrEnum):
    OK = "ok"
    WRONG = "wrong"
    HUNG = "hung"
    FAILED = "failed"
    SLOW = "slow"
    UNTESTED = "could not be tested"  # says nothing of the node


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a validation measured, as history. Comparable where nodes, ranks and devices are the same."""

    nodes: tuple[str, ...]  # one, or a pair
    ranks: int
    device: str
    figures: Mapping[str, float] = field(default_factory=dict)  # by workload, of the slowest rank
    checksums: Mapping[str, str] = field(default_factory=dict)  # by workload, of all ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far behind the fleet's median is slow, as a factor."""

    others_min: int = 3  # nodes that a comparison with the fleet needs
    many: int = 8  # from here on their own spread says what is usual, before that the guesses below
    few_factor: float = 1.3  # devices of a kind are within a few per cent of each other
    few_factor_cpu: float = 5.0  # slots share their machine with whatever else it does
    spreads: float = 6.0  # standard deviations of the fleet's figures
    least_factor: float = 1.1  # a job is as fast as its slowest node: less than this nobody is sent away for
    least_factor_cpu: float = 2.0

    def allowed(self, known: Sequence[float], *, cpu: bool) -> float:
        """`known`: what others measured."""
        if len(known) < self.many:
            return self.few_factor_cpu if cpu else self.few_factor
        middle = median(known)
        spread = _NORMAL * median(abs(math.log(figure / middle)) for figure in known)
        return max(self.least_factor_cpu if cpu else self.least_factor, math.exp(self.spreads * spread))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    verdict: Verdict
    reason: str
    kept: Kept | None = None  # None: it was not right, so nobody should be compared with it


def judge(
    results: Iterable[Result],
    *,
    nodes: tuple[str, ...],
    ranks: int,
    history: Sequence[Kept] = (),
    limits: Limits | None = None,
) -> Judged:
    """`nodes`: whose, one or a pair. `history`: of all nodes, the oldest first."""
    said = _in_order(results)
    problem = _wrong(said) or _devices_differ(said) or _unfinished(said, ranks)
    if problem is not None:
        return problem
    refused = [result for _, result in said if result.outcome is Outcome.UNTESTED]
    if refused and not any(result.outcome is Outcome.OK for _, result in said):
        return _told(Verdict.UNTESTED, refused)
    kept = _kept(said, nodes, ranks)
    others = _others(kept, history)
    limits = limits or Limits()
    return (
        _differs_from_fleet(kept, others, limits)
        or _slower_than_fleet(kept, others, limits)
        or Judged(verdict=Verdict.OK, reason=_fine(said, ranks, others), kept=kept)
    )


_InOrder = Sequence[tuple[int, Result]]  # with its place among its rank's own


def _in_order(results: Iterable[Result]) -> _InOrder:
    """What others build on first: a device that multiplies wrong also trains wrong."""
    counts: Counter[int] = Counter()
    placed = []
    for result in results:
        placed.append((counts[result.rank], result))
        counts[result.rank] += 1
    return sorted(placed, key=lambda one: (one[0], one[1].rank))


def _wrong(said: _InOrder) -> Judged | None:
    found = [result for _, result in said if result.outcome is Outcome.WRONG]
    return _told(Verdict.WRONG, found) if found else None


def _told(verdict: Verdict, found: Sequence[Result]) -> Judged:
    """The first one, with all ranks that say the same of it."""
    first = found[0]
    same = [one for one in found if (one.workload, one.outcome) == (first.workload, first.outcome)]
    reason = f"{first.workload} on {_ranks(one.rank for one in same)}: {first.text}"
    return Judged(verdict=verdict, reason=reason)


def _ranks(numbers: Iterable[int]) -> str:
    listed = sorted(numbers)
    return f"rank{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed))}"


def _devices_differ(said: _InOrder) -> Judged | None:
    """Devices of a kind that were given the same: the minority is named, if there is one."""
    groups: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for _, result in said:
        if result.checksum:
            groups[result.workload, result.device][result.rank] = result.checksum
    for (workload, _), sums in groups.items():
        counts = Counter(sums.values()).most_common()
        if len(counts) == 1:
            continue
        tied = counts[0][1] == counts[1][1]
        odd = [rank for rank, found in sums.items() if tied or found != counts[0][0]]
        what = "do not agree" if tied else f"gave another checksum than {counts[0][1]} others"
        return Judged(verdict=Verdict.WRONG, reason=f"{workload}: {_ranks(odd)} {what}")
    return None


def _unfinished(said: _InOrder, ranks: int) -> Judged | None:
    """By the earliest workload that did not end: those who wait for somebody end later, or not at all."""
    found = [(place, result) for place, result in said if result.outcome in (Outcome.HUNG, Outcome.FAILED)]
    ended = {result.rank for place, result in said if result.workload.startswith(TRAINING)}
    ended |= {result.rank for _, result in found}
    for rank in range(ranks):
        if rank not in ended:
            last = [result for _, result in said if result.rank == rank]
            after = f"after {last[-1].workload}" if last else "at all"
            text = f"it said nothing {after}"
            mute = Result(rank=rank, workload="validation", outcome=Outcome.HUNG, text=text)
            found.append((len(last), mute))
    if not found:
        return None
    found.sort(key=lambda one: (one[0], one[1].outcome is Outcome.FAILED, one[1].rank))
    first = found[0][1].outcome
    return _told(Verdict(first), [result for _, result in found])


def _kept(said: _InOrder, nodes: tuple[str, ...], ranks: int) -> Kept:
    figures: dict[str, float] = {}
    checksums: dict[str, str] = {}
    for _, result in said:
        if result.figure:
            figures[result.workload] = min(result.figure, figures.get(result.workload, result.figure))
        if result.checksum:
            checksums[result.workload] = result.checksum
    return Kept(nodes=nodes, ranks=ranks, device=said[0][1].device, figures=figures, checksums=checksums)


def _others(kept: Kept, history: Iterable[Kept]) -> list[Kept]:
    """The newest of each other node, or pair, that can be compared."""
    like = (len(kept.nodes), kept.ranks, kept.device)
    alike = (one for one in history if (len(one.nodes), one.ranks, one.device) == like)
    newest = {one.nodes: one for one in alike if one.nodes != kept.nodes}
    return list(newest.values())


def _differs_from_fleet(kept: Kept, others: Sequence[Kept], limits: Limits) -> Judged | None:
    for workload, found in kept.checksums.items():
        counts = Counter(one.checksums[workload] for one in others if workload in one.checksums)
        if counts.total() < limits.others_min:
            continue
        usual, times = counts.most_common(1)[0]
        if found != usual and 2 * times > counts.total():
            reason = f"{workload} gives {found}, {times} of {counts.total()} others give {usual}"
            return Judged(verdict=Verdict.WRONG, reason=reason)
    return None


def _slower_than_fleet(kept: Kept, others: Sequence[Kept], limits: Limits) -> Judged | None:
    """By the workload that is behind most."""
    cpu = kept.device.startswith("cpu")
    behind: dict[str, tuple[float, float]] = {}  # how far, and how far it may be
    for workload, figure in kept.figures.items():
        known = [one.figures[workload] for one in others if one.figures.get(workload)]
        if len(known) >= limits.others_min:
            behind[workload] = median(known) / figure, limits.allowed(known, cpu=cpu)
    over = {workload: far / allowed for workload, (far, allowed) in behind.items() if far > allowed}
    if not over:
        return None
    workload = max(over, key=lambda name: over[name])
    far, allowed = behind[workload]
    reason = (
        f"{workload} is {far:.2g} times slower than the median of {len(others)} others, "
        f"where {allowed:.2g} is usual"
    )
    return Judged(verdict=Verdict.SLOW, reason=reason)


def _fine(said: _InOrder, ranks: int, others: Sequence[Kept]) -> str:
    workloads = len({result.workload for _, result in said})
    fleet = f", compared with {len(others)} others" if others else ""
    untested = {result.workload: result.text for _, result in said if result.outcome is Outcome.UNTESTED}
    but = "".join(f"; {workload} could not be tested: {why}" for workload, why in untested.items())
    return f"{workloads - len(untested)} workloads on {ranks} rank{'s' if ranks != 1 else ''}{fleet}{but}"
