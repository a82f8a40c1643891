"""What the results of a validation say of a node, or of a pair of nodes.

A checksum that differs is proof, from its reference, from the node's other devices, or from what most other
nodes of the same kind gave. Slow is a comparison with the fleet, as it was measured before: without a history
nobody is slow.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from keepstep.core.validation import TRAINING, Outcome, Result


class Verdict(StrEnum):
    OK = "ok"
    WRONG = "wrong"
    HUNG = "hung"
    FAILED = "failed"
    SLOW = "slow"


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
    slow_factor: float = 1.3  # below the fleet's median; devices of a kind are within a few per cent
    slow_factor_cpu: float = 5.0  # slots share their machine with whatever else it does
    others_min: int = 3  # nodes that a comparison with the fleet needs


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
    said = sorted(results, key=lambda result: result.rank)
    problem = (
        _of(said, Outcome.WRONG, Verdict.WRONG)
        or _devices_differ(said)
        or _of(said, Outcome.HUNG, Verdict.HUNG)
        or _of(said, Outcome.FAILED, Verdict.FAILED)
        or _silent(said, ranks)
    )
    if problem is not None:
        return problem
    kept = _kept(said, nodes, ranks)
    others = _others(kept, history)
    limits = limits or Limits()
    return (
        _differs_from_fleet(kept, others, limits)
        or _slower_than_fleet(kept, others, limits)
        or Judged(verdict=Verdict.OK, reason=_fine(said, ranks, others), kept=kept)
    )


def _of(said: Sequence[Result], outcome: Outcome, verdict: Verdict) -> Judged | None:
    found = [result for result in said if result.outcome is outcome]
    if not found:
        return None
    first = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Judged(verdict=verdict, reason=f"{first.workload} on rank {first.rank}: {first.text}{more}")


def _devices_differ(said: Sequence[Result]) -> Judged | None:
    """Devices of a kind that were given the same: the minority is named, if there is one."""
    groups: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for result in said:
        if result.checksum:
            groups[result.workload, result.device][result.rank] = result.checksum
    for (workload, _), sums in groups.items():
        counts = Counter(sums.values()).most_common()
        if len(counts) == 1:
            continue
        tied = counts[0][1] == counts[1][1]
        odd = [rank for rank, found in sums.items() if tied or found != counts[0][0]]
        who = f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}"
        what = "do not agree" if tied else f"gave another checksum than {counts[0][1]} others"
        return Judged(verdict=Verdict.WRONG, reason=f"{workload}: {who} {what}")
    return None


def _silent(said: Sequence[Result], ranks: int) -> Judged | None:
    done = {result.rank for result in said if result.workload.startswith(TRAINING)}
    missing = [rank for rank in range(ranks) if rank not in done]
    if not missing:
        return None
    last = [result.workload for result in said if result.rank == missing[0]]
    after = f"after {last[-1]}" if last else "at all"
    return Judged(verdict=Verdict.HUNG, reason=f"rank {missing[0]} of {ranks} said nothing {after}")


def _kept(said: Sequence[Result], nodes: tuple[str, ...], ranks: int) -> Kept:
    figures: dict[str, float] = {}
    checksums: dict[str, str] = {}
    for result in said:
        if result.figure:
            figures[result.workload] = min(result.figure, figures.get(result.workload, result.figure))
        if result.checksum:
            checksums[result.workload] = result.checksum
    return Kept(nodes=nodes, ranks=ranks, device=said[0].device, figures=figures, checksums=checksums)


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
    allowed = limits.slow_factor_cpu if kept.device.startswith("cpu") else limits.slow_factor
    behind: dict[str, float] = {}
    for workload, figure in kept.figures.items():
        known = [one.figures[workload] for one in others if workload in one.figures]
        if len(known) >= limits.others_min:
            behind[workload] = median(known) / figure
    if not behind or max(behind.values()) <= allowed:
        return None
    workload = max(behind, key=lambda name: behind[name])
    reason = f"{workload} is {behind[workload]:.1f} times slower than the median of {len(others)} others"
    return Judged(verdict=Verdict.SLOW, reason=reason)


def _fine(said: Sequence[Result], ranks: int, others: Sequence[Kept]) -> str:
    workloads = len({result.workload for result in said})
    fleet = f", compared with {len(others)} others" if others else ""
    return f"{workloads} workloads on {ranks} rank{'s' if ranks != 1 else ''}{fleet}"
