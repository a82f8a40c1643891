"""The snapshot protocol, explored: every order in which copies, acknowledgements, collectives, kills and
restores can come, for a few ranks and steps, with the very rules that ranks and carriers follow.

A rank's life: it computes, it enters the gradient collective of its next step (its last copy must be whole by
then), it passes when all have entered, and may begin to copy its new state. Its carrier sends whole copies,
one after the other, to the next rank's node, and publishes what came back. At any moment the gang may be
killed, or one node lost with all it held; a restore may reach only some nodes before the next kill.

Held: after a kill there is a state that every rank has, with four slots the last but one at most; after the
loss of a node there is one that is not older than what was sealed. The same search finds what is lost when a
rule is weakened.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import pytest

from keepstep.core.snapshots import (
    BUDDY,
    LEAST_SLOTS,
    NO_BUDDY,
    SLOTS,
    Stamp,
    after_restore,
    free_slot,
    frees_at,
    on_chain,
    origin,
    protected,
    to_send,
)

Stamps = tuple[Stamp | None, ...]
Lineage = tuple[Stamp | None, ...]  # by attempt, from 1 on: what it began from


class Slots(NamedTuple):
    """What is whole, and what is being written into one of them."""

    at: Stamps
    writing: tuple[int, Stamp] | None = None

    def begin(self, number: int, stamp: Stamp) -> "Slots":
        emptied = tuple(None if k == number else at for k, at in enumerate(self.at))
        return Slots(emptied, (number, stamp))

    def finish(self) -> "Slots":
        assert self.writing is not None
        number, stamp = self.writing
        return Slots(tuple(stamp if k == number else at for k, at in enumerate(self.at)))

    def torn(self) -> "Slots":
        return Slots(self.at)


NO_COPIES = Slots((None,) * LEAST_SLOTS)


class Rank(NamedTuple):
    step: int
    own: Slots
    copy: Slots  # at its buddy
    entered: bool = False
    sealed: Stamp | None = None
    acknowledged: Stamp | None = None
    says: tuple[tuple[int, int], ...] = ((-1, -1), (-1, -1))  # in the reduction of an even, of an odd step


class World(NamedTuple):
    ranks: tuple[Rank, ...]
    lineage: Lineage
    kills: int
    losses: int
    sealed: int = -1  # the newest step that any rank has taken for sealed, and no loss has put in question

    @property
    def attempt(self) -> int:
        return len(self.lineage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    ranks: int = 2
    steps: int = 3
    kills: int = 1
    losses: int = 0
    buddies: bool = True
    slots: int = SLOTS
    gate: str = "collective"  # when the last copy must be whole: | "update" (all have entered) | "never"
    purge: bool = True  # a restore drops what was left
    keeps_older: bool = True  # a restore leaves what lies before its point
    in_order: bool = True  # what is to be sent next is the same for all ranks


class Explorer:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.seen: set[World] = set()
        self._known: dict[object, tuple[Rank, ...]] = {}  # what a rank may do next, by all that it depends on

    def search(self) -> str:
        """What was lost first, or nothing."""
        empty = Slots((None,) * self.rules.slots)
        ranks = tuple(Rank(0, empty, NO_COPIES) for _ in range(self.rules.ranks))
        start = World(ranks, (None,), self.rules.kills, self.rules.losses)
        queue = deque([start])
        self.seen.add(start)
        while queue:
            world = queue.popleft()
            lost = self._lost(world)
            if lost:
                return f"{lost}: {world}"
            for following in self._following(world):
                if following not in self.seen:
                    self.seen.add(following)
                    queue.append(following)
        return ""

    # ---------------------------------------------------------------- what must hold

    def _lost(self, world: World) -> str:
        newest = max(rank.step for rank in world.ranks)
        point = self._point(world, ())
        if point is None and (newest > 1 or world.lineage[-1]):
            return "a kill leaves no common state"
        skips = self.rules.buddies and self.rules.slots == LEAST_SLOTS
        if not skips and newest - (point.step if point else 0) > 1:
            return "a kill costs more than one step"
        if point is not None and self.rules.buddies:
            for node in range(len(world.ranks)):
                left = self._point(world, (node,))
                if world.sealed > (left.step if left else -1):
                    return f"node {node} takes what was sealed along"
        return ""

    def _point(self, world: World, lost: tuple[int, ...]) -> Stamp | None:
        """The newest state on the chain that every rank has somewhere, were these nodes lost."""
        common: frozenset[Stamp] | None = None
        count = len(world.ranks)
        for k, rank in enumerate(world.ranks):
            held: Stamps = () if k in lost else rank.own.at
            if self.rules.buddies and (k + 1) % count not in lost:
                held += rank.copy.at
            made = _all_made(held, world.lineage)
            common = made if common is None else common & made
        return max(common or (), default=None, key=lambda at: at.step)

    # ---------------------------------------------------------------- what may come

    def _following(self, world: World) -> Iterator[World]:
        told = tuple((rank.step, rank.entered, rank.says) for rank in world.ranks)
        for k, rank in enumerate(world.ranks):
            known = rank, told, world.attempt
            if known not in self._known:
                self._known[known] = tuple(self._steps(world, rank))
            for after in self._known[known]:
                ranks = tuple(after if n == k else other for n, other in enumerate(world.ranks))
                sealed = max(world.sealed, after.sealed.step if after.sealed else -1)
                yield world._replace(ranks=ranks, sealed=sealed)
        if world.kills:
            yield from self._restored(world._replace(kills=world.kills - 1), ())
        if world.losses:
            for node in range(len(world.ranks)):
                yield from self._restored(world._replace(losses=world.losses - 1, sealed=-1), (node,))

    def _steps(self, world: World, rank: Rank) -> Iterator[Rank]:
        rules = self.rules
        if rank.own.writing:
            yield rank._replace(own=rank.own.finish())
        if rules.buddies:
            yield from self._copying(rank, world.attempt)
        if rank.step >= rules.steps:
            return
        if not rank.entered and not (rules.gate == "collective" and rank.own.writing):
            kind = BUDDY if rules.buddies else NO_BUDDY
            said = (
                protected(rank.own.at, world.attempt, (kind, rank.acknowledged)),
                frees_at(rank.own.at, rank.sealed, world.attempt),
            )
            says = tuple(said if n == rank.step % 2 else old for n, old in enumerate(rank.says))
            yield rank._replace(entered=True, says=says)
        late = rules.gate == "update" and rank.own.writing
        all_in = all(
            other.step > rank.step or (other.step == rank.step and other.entered) for other in world.ranks
        )
        if rank.entered and all_in and not late:
            yield self._passed(world, rank)

    def _passed(self, world: World, rank: Rank) -> Rank:
        said = [other.says[rank.step % 2] for other in world.ranks]
        least = min(newest for newest, _ in said)
        sealed = max(filter(None, (rank.sealed, Stamp(world.attempt, least) if least >= 0 else None)),
                     default=None)  # fmt: skip
        needed = max(needs for _, needs in said)
        after = rank._replace(step=rank.step + 1, entered=False, sealed=sealed)
        number = free_slot(rank.own.at, sealed, world.attempt)
        if rank.own.writing or number is None or (sealed.step if sealed else -1) < needed:
            return after
        return after._replace(own=rank.own.begin(number, Stamp(world.attempt, after.step)))

    def _copying(self, rank: Rank, attempt: int) -> Iterator[Rank]:
        """The carrier's side: send, receive, publish."""
        if rank.copy.writing:
            yield rank._replace(copy=rank.copy.finish())
            return
        there = [at for at in rank.copy.at if at and at.attempt == attempt]
        newest = max(there, default=None)
        if newest and newest != rank.acknowledged:
            yield rank._replace(acknowledged=newest)
        following = to_send(rank.own.at, rank.sealed, attempt)
        waiting = [at for at in rank.own.at if at and at.attempt == attempt]
        for at in waiting:
            if at in there or (newest and at < newest) or (self.rules.in_order and at != following):
                continue
            number = free_slot(rank.copy.at, rank.sealed)
            if number is not None:
                yield rank._replace(copy=rank.copy.begin(number, at))

    def _restored(self, world: World, lost: tuple[int, ...]) -> Iterator[World]:
        """Every rank is dead. The next attempt begins, everywhere or on some nodes, and is killed."""
        point = self._point(world, lost)
        if point is None and not lost and max(rank.step for rank in world.ranks) > 1:
            return  # said by _lost
        count, lineage = len(world.ranks), (*world.lineage, point)
        empty = Slots((None,) * self.rules.slots)
        for reached in range(1, 1 << count):
            whole = reached == (1 << count) - 1
            if not whole and not world.kills:
                continue
            ranks = []
            for k, rank in enumerate(world.ranks):
                own = empty if k in lost else rank.own.torn()
                copy = NO_COPIES if (k + 1) % count in lost else rank.copy.torn()
                if reached >> k & 1:
                    own = self._stamped(own, lineage, rank.sealed, point)
                if reached >> (k + 1) % count & 1:
                    copy = self._stamped(copy, lineage, rank.sealed, None)
                ranks.append(Rank(point.step if point else 0, own, copy))
            after = world._replace(ranks=tuple(ranks), lineage=lineage)
            if whole:
                yield after
            else:
                yield from self._restored(after._replace(kills=after.kills - 1), ())

    def _stamped(self, slots: Slots, lineage: Lineage, sealed: Stamp | None, fetched: Stamp | None) -> Slots:
        parents, attempt = _parents(lineage), len(lineage)
        stamps: Stamps = slots.at
        if self.rules.purge:
            stamps = after_restore(stamps, attempt, parents, sealed)
        if not self.rules.keeps_older:
            stamps = tuple(at if at and at.attempt == attempt else None for at in stamps)
        if fetched and Stamp(attempt, fetched.step) not in stamps and self.rules.purge:
            number = free_slot(stamps, Stamp(attempt, fetched.step))
            assert number is not None
            stamps = tuple(Stamp(attempt, fetched.step) if k == number else at for k, at in enumerate(stamps))
        return Slots(stamps)


@cache
def _all_made(held: Stamps, lineage: Lineage) -> frozenset[Stamp]:
    return frozenset(state for at in held if at and (state := _made(at, lineage)))


@cache
def _made(at: Stamp, lineage: Lineage) -> Stamp | None:
    """What a stamp stands for; None: it is not on the chain."""
    parents = _parents(lineage)
    return origin(at, parents) if on_chain(at, len(lineage), parents) else None


def _parents(lineage: Lineage) -> dict[int, Stamp | None]:
    return dict(enumerate(lineage, 1))


HELD = {
    "two ranks, a kill": Rules(steps=3),
    "two ranks, more steps, a kill": Rules(steps=4),
    "two ranks, two kills": Rules(steps=2, kills=2),
    "two ranks, a kill and a lost node": Rules(kills=1, losses=1, steps=2),
    "two ranks, many steps": Rules(steps=5, kills=0),
    "two ranks with three slots, a kill and a lost node": Rules(slots=3, kills=1, losses=1, steps=2),
    "two ranks with three slots, many steps": Rules(slots=3, steps=5, kills=0),
    "two ranks without buddies, three kills": Rules(buddies=False, steps=4, kills=3),
    "three ranks without buddies, two kills": Rules(ranks=3, buddies=False, steps=4, kills=2),
    "three ranks": Rules(ranks=3, steps=2, kills=0),
}
WEAKENED = {
    "the newest may be sent first": (Rules(steps=5, kills=0, in_order=False), "was sealed"),
    "copies may be late": (Rules(buddies=False, steps=5, gate="never"), "no common state"),
    "two slots, copies whole before the update": (
        Rules(buddies=False, steps=5, slots=2, gate="update"), "no common state"
    ),
    "a restore drops what lies before its point": (Rules(keeps_older=False), "was sealed"),
    "a restore leaves the slots as they are": (
        Rules(purge=False, kills=2, buddies=False, slots=3), "more than one step"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_no_order_of_events_loses_a_state(name: str) -> None:
    explorer = Explorer(HELD[name])
    assert explorer.search() == ""
    assert len(explorer.seen) > 100


@pytest.mark.parametrize("name", WEAKENED)
def test_a_weaker_rule_loses_one(name: str) -> None:
    rules, lost = WEAKENED[name]
    assert lost in Explorer(rules).search()
