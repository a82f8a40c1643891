"""Who waits for whom in a gang that stands still, and so who is to blame.

An edge goes from a rank that waits to each rank that it waits for: to its pipeline peer, or to those members
of its group that have not come to the same collective. What a rank marked in its beacon comes first, then the
flight recorder's sequence numbers, then whether its stack lies inside a collective. The blame follows the
edges to where they end:

    a rank that waits for nobody      it is the one that everybody waits for
    a circle                          members wait for each other in different collectives: a mismatch
    a collective that all have begun  and that does not end: whatever carries it, a link or a driver

Where nobody is seen to wait, the rank with the least progress is named, and where nobody is behind, none is.
All candidates are given, not only the likeliest, so that whoever acts on it can grant the most patient bound.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from keepstep.core.ids import Rank
from keepstep.core.layout import Layout
from keepstep.decide.view import Finding, RankPhase, RankView, Recorded

_COLLECTIVE = re.compile(
    r"torch/distributed/|c10d|\b(all_reduce|all_gather\w*|reduce_scatter\w*|all_to_all\w*|broadcast|barrier)\b"
)
_INNERMOST = 6  # frames that are looked at for a collective

Edges = Mapping[Rank, frozenset[Rank]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """`ranks`: candidates, the likeliest first; `named` says if the first of them stands out."""

    ranks: tuple[Rank, ...]
    named: bool
    why: str
    mismatch: bool = False
    even: bool = False  # as many are in the one collective as in the other: the odd one may be either
    carrier: bool = False  # it is no rank: what carries a collective is stuck


def blame(ranks: Iterable[RankView], layout: Layout, findings: Iterable[Finding] = ()) -> Blame:
    found = {finding.rank: finding for finding in findings}
    by_rank = {one.rank: one for one in ranks}
    edges = waits(by_rank, layout, found)
    wanted = frozenset(rank for targets in edges.values() for rank in targets)
    clash = mismatch(found.values())
    if clash:
        members = tuple(rank for rank in clash[0] if rank in by_rank) or clash[0]
        return Blame(ranks=members, named=True, why=clash[1], mismatch=True, even=clash[2])
    sinks = [by_rank[rank] for rank in wanted if rank in by_rank and rank not in edges]
    if sinks:
        first, *others = sorted(sinks, key=_progress)
        why = f"{_count(len(edges))} for it, directly or through others"
        if others:
            why = f"of {len(sinks)} ranks that others wait for it has the least progress"
        return Blame(ranks=(first.rank, *(one.rank for one in others)), named=True, why=why)
    stuck = sorted((by_rank[rank] for rank, targets in edges.items() if not targets), key=_progress)
    if stuck:
        where = _collective(stuck[0])
        why = f"every member has begun {where}, and it does not end: what carries it is stuck"
        return Blame(ranks=tuple(one.rank for one in stuck), named=False, why=why, carrier=True)
    if edges:
        circle = _circle(by_rank, edges)
        each = "; ".join(
            f"rank {one} waits in {_collective(by_rank[one]) or 'a collective'}" for one in circle[:4]
        )
        why = f"they wait for each other: {each}"
        return Blame(ranks=circle, named=True, why=why, mismatch=True, even=True)
    return _least(by_rank, found)


def waits(by_rank: Mapping[Rank, RankView], layout: Layout, found: Mapping[Rank, Finding]) -> Edges:
    """Only ranks that wait have an entry; an empty one: everybody whom it waits for has come."""
    edges: dict[Rank, frozenset[Rank]] = {}
    for one in by_rank.values():
        if one.phase is not RankPhase.RUNNING:
            continue
        if one.waiting_s is not None:
            edges[one.rank] = _marked(one, by_rank, layout)
        elif not one.group and (recorded := _recorded(one, found)) is not None:
            edges[one.rank] = recorded
    return edges


def _marked(one: RankView, by_rank: Mapping[Rank, RankView], layout: Layout) -> frozenset[Rank]:
    if one.peer >= 0:
        return frozenset({Rank(one.peer)})
    dimension = one.group.partition(".")[0]
    known = dimension in ("dp", "pp", "cp", "tp") and one.rank < layout.world_size
    members = layout.group(dimension, one.rank) if known else tuple(by_rank)
    return frozenset(m for m in members if m != one.rank and not _arrived(by_rank.get(m), one))


def _arrived(member: RankView | None, one: RankView) -> bool:
    return (
        member is not None
        and member.phase is RankPhase.RUNNING
        and member.group == one.group
        and member.group_sequence >= one.group_sequence
    )


def _recorded(one: RankView, found: Mapping[Rank, Finding]) -> frozenset[Rank] | None:
    """By the flight recorders: those that have not begun what this rank has begun and not completed."""
    finding = found.get(one.rank)
    if finding is None:
        return None
    open_groups = [group for group in finding.groups if group.enqueued > group.completed]
    behind = {
        member
        for group in open_groups
        for member in group.ranks
        if member != one.rank and member in found and _enqueued(found[member], group) < group.enqueued
    }
    if behind:
        return frozenset(behind)
    # What it has begun all have begun: it waits for it only if it stands in it, not while it computes beside.
    return frozenset() if open_groups and in_collective(finding.stack) else None


def _enqueued(finding: Finding, group: Recorded) -> int:
    same = (one for one in finding.groups if (one.name, one.ranks) == (group.name, group.ranks))
    return next((one.enqueued for one in same), 0)


def mismatch(findings: Iterable[Finding]) -> tuple[tuple[Rank, ...], str, bool] | None:
    """Ranks that began different operations as the same collective of one group: the odd ones first.

    With why, and whether the odd ones are no fewer than the others.
    """
    by_place: dict[tuple[str, tuple[Rank, ...], int], dict[str, list[Rank]]] = {}
    for finding in findings:
        for group in finding.groups:
            if group.enqueued > group.completed and group.op:
                place = by_place.setdefault((group.name, group.ranks, group.enqueued), {})
                place.setdefault(group.op, []).append(finding.rank)
    for (name, _, sequence), ops in sorted(by_place.items()):
        if len(ops) > 1:
            (odd, few), *rest = sorted(ops.items(), key=lambda item: (len(item[1]), item[1]))
            most = rest[-1]
            why = (
                f"mismatched collective {sequence} of group {name or 'default'}: rank {few[0]} is in {odd}, "
                f"{_listed(most[1])} in {most[0]}"
            )
            return (*few, *(rank for _, them in rest for rank in them)), why, len(few) == len(most[1])
    return None


def in_collective(stack: tuple[str, ...]) -> bool:
    return any(_COLLECTIVE.search(frame) for frame in stack[:_INNERMOST])


def _least(by_rank: Mapping[Rank, RankView], found: Mapping[Rank, Finding]) -> Blame:
    ordered = sorted(by_rank.values(), key=_progress)
    waiting = {rank for rank, finding in found.items() if in_collective(finding.stack)}
    others = [one for one in ordered if one.rank not in waiting]
    if waiting and others:
        count = len(ordered) - len(others)
        why = f"its stack lies outside of any collective, those of {count} others inside"
        return Blame(ranks=tuple(one.rank for one in others), named=len(others) == 1, why=why)
    behind = [one for one in ordered if one.step < ordered[-1].step]
    if behind:
        why = f"it has completed {max(behind[0].step, 0)} steps, others {ordered[-1].step}"
        return Blame(ranks=tuple(one.rank for one in behind), named=True, why=why)
    return Blame(ranks=tuple(one.rank for one in ordered), named=len(ordered) == 1, why="no rank stands out")


def _circle(by_rank: Mapping[Rank, RankView], edges: Edges) -> tuple[Rank, ...]:
    """Along the edges, always to the one with the least progress, until a rank comes again."""
    starts = [by_rank[rank] for rank, targets in edges.items() if targets]
    at = min(starts, key=_progress).rank
    path: list[Rank] = []
    while at not in path:
        path.append(at)
        onward = [by_rank[rank] for rank in edges.get(at, ()) if rank in by_rank]
        if not onward:
            return (at,)
        at = min(onward, key=_progress).rank
    circle = path[path.index(at) :]
    return tuple(sorted(circle, key=lambda rank: _progress(by_rank[rank])))


def _progress(one: RankView) -> tuple[int, int, int]:
    return one.step, one.completed, one.rank


def _collective(one: RankView) -> str:
    if one.peer >= 0:
        return f"{one.group or 'the pipeline'} for rank {one.peer}"
    return f"collective {one.group_sequence} of group {one.group}" if one.group else ""


def _count(number: int) -> str:
    return "1 rank waits" if number == 1 else f"{number} ranks wait"


def _listed(ranks: list[Rank]) -> str:
    named = ", ".join(map(str, ranks[:6])) + (", ..." if len(ranks) > 6 else "")
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
