"""Which state the next attempt begins from: one that is whole in memory, else a stored one.

Every attempt began from its parent's state after some step, so the attempts of a job form a tree, and the
present one is the end of a chain. A checkpoint (attempt, step) may be restored only if it lies on that chain:
its attempt is the last one or an ancestor, and its step is neither past the point where the chain left that
ancestor nor past the last one that is known to be good. What an old attempt wrote later lies on a branch that
was left, whatever its step or file time says.

A state is whole in memory when every rank of the layout that it was taken in is held by some node that
answers, its own or as a buddy's copy. A stamp that a restore renewed counts as what it was before, so a
restore that reached only some nodes has taken nothing away.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from keepstep.core import snapshots
from keepstep.core.ids import Attempt, Rank, Step
from keepstep.core.layout import Layout
from keepstep.core.snapshots import Stamp
from keepstep.decide.plan import Memory
from keepstep.decide.view import BEGINNING, NOTHING, Kept, Link, Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePoint:
    at: Stored | None  # None: nothing on the chain was ever stored
    reason: str
    memory: Memory | None = None  # where it is, if it is not in storage

    def link(self, attempt: Attempt) -> Link:
        """How the attempt that begins here joins the lineage."""
        if self.at is None:
            return Link(attempt=attempt, parent=NOTHING, parent_step=BEGINNING)
        return Link(attempt=attempt, parent=self.at.attempt, parent_step=self.at.step)


def chain(lineage: Sequence[Link]) -> Mapping[Attempt, Step | None]:
    """The last attempt and its ancestors, each with the last step that lies on the chain (None: any)."""
    by_attempt = {link.attempt: link for link in lineage}
    limits: dict[Attempt, Step | None] = {}
    link = lineage[-1] if lineage else None
    limit: Step | None = None
    while link is not None:
        if link.good_until is not None:
            limit = link.good_until if limit is None else min(limit, link.good_until)
        limits[link.attempt] = limit
        if link.parent >= link.attempt or link.parent == NOTHING:
            break  # a lineage that does not go back in time is not followed
        limit = link.parent_step if limit is None else min(limit, link.parent_step)
        link = by_attempt.get(link.parent)
    return limits


def restore_point(lineage: Sequence[Link], stored: Iterable[Stored]) -> RestorePoint:
    """The newest stored state on the chain of the last attempt; says why newer ones were left out."""
    limits = chain(lineage)
    newest_first = sorted(stored, key=lambda one: (one.step, one.attempt), reverse=True)
    left_out: list[str] = []
    for one in newest_first:
        if one.attempt not in limits:
            left_out.append(f"step {one.step} of attempt {one.attempt} is not on the chain")
            continue
        limit = limits[one.attempt]
        if limit is None or one.step <= limit:
            return RestorePoint(
                at=one,
                reason="; ".join([f"step {one.step} of attempt {one.attempt} is stored", *left_out[:3]]),
            )
        left_out.append(
            f"step {one.step} of attempt {one.attempt} is past step {limit}, where the chain left it"
        )
    nothing = "nothing is stored" if not newest_first else "nothing stored is on the chain"
    return RestorePoint(at=None, reason="; ".join([nothing, *left_out[:3]]))


def protected_step(lineage: Sequence[Link], kept: Sequence[Kept], shape: Layout) -> int:
    """The newest step that is whole in memory whichever one node is lost; -1: none is.

    Counted from what nodes say that they hold, so a loss shows until what was lost is copied again.
    """
    nodes = {one.node for one in kept}
    points = [memory_point(lineage, [one for one in kept if one.node != lost], shape).at for lost in nodes]
    return min((int(at.step) if at is not None else -1 for at in points), default=-1)


def memory_point(lineage: Sequence[Link], kept: Iterable[Kept], shape: Layout) -> RestorePoint:
    """The newest state on the chain that is whole in memory; says what newer ones lack.

    `shape`: of the job, with whatever number of replicas.
    """
    if not lineage:
        return RestorePoint(at=None, reason="nothing is in memory")
    parents: dict[int, Stamp | None] = {
        link.attempt: None if link.parent == NOTHING else Stamp(link.parent, link.parent_step)
        for link in lineage
    }
    limits = chain(lineage)
    found: dict[tuple[Stamp, int], dict[Rank, list[Kept]]] = {}
    for one in kept:
        at = Stamp(one.attempt, one.step)
        limit = limits.get(one.attempt)
        if limit is not None and one.step > limit:
            continue  # past what is known to be good
        if snapshots.on_chain(at, lineage[-1].attempt, parents):
            state = snapshots.origin(at, parents), one.world
            found.setdefault(state, {}).setdefault(one.rank, []).append(one)
    shortfall: list[str] = []
    for (at, world), ranks in sorted(found.items(), key=lambda item: item[0][0].step, reverse=True):
        replicas, rest = divmod(world, shape.replica_size)
        lacking = [rank for rank in range(world) if rank not in ranks]
        if lacking or rest:
            lost = ", ".join(map(str, lacking[:8])) + (" ..." if len(lacking) > 8 else "")
            shortfall.append(f"step {at.step} is in memory, but not of ranks {lost}")
            continue
        held = [sorted(ranks[Rank(rank)], key=lambda one: (not one.own, one.node)) for rank in range(world)]
        holders = tuple(tuple(dict.fromkeys(one.node for one in nodes)) for nodes in held)
        copies = sum(not nodes[0].own for nodes in held)
        where = f"{copies} of {world} as buddies' copies" if copies else f"{world} of {world} ranks in place"
        return RestorePoint(
            at=Stored(attempt=Attempt(at.attempt), step=Step(at.step)),
            reason="; ".join([f"step {at.step} is whole in memory, {where}", *shortfall[:3]]),
            memory=Memory(layout=shape.with_replicas(replicas), holders=holders),
        )
    return RestorePoint(at=None, reason="; ".join(shortfall[:3]) or "nothing is in memory")
