"""What pools are asked and what they tell: which jobs need nodes, which nodes there could be or will go."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from keepstep.control.book import Book, Entry
from keepstep.control.fleet import Fleet, Member
from keepstep.core.ids import Node
from keepstep.core.states import WORKING, LifeState, NodeState
from keepstep.decide.life import KEEPSTEP
from keepstep.pools.pool import Asked, Known, Pool, Told, Want
from keepstep.store import Writer
from keepstep.store.rows import NewEvent

Write = Callable[[Callable[[Writer], None]], Awaitable[Any]]
_NO_AGENT = "no agent: one comes when a job needs the node"


class Supply:
    def __init__(self, fleet: Fleet, book: Book, pools: Mapping[str, Pool], write: Write) -> None:
        self._fleet, self._book, self._pools, self._write = fleet, book, pools, write

    async def ask(self) -> None:
        """Positive evidence of death comes from pools only; silence is none."""
        for member in list(self._fleet.members.values()):
            gone = not self._connected(member.name) and member.state in {NodeState.READY, NodeState.SILENT}
            pool = self._pools.get(member.pool)
            if gone and pool is not None and not member.confirmed:
                member.confirmed = await pool.confirm_dead(member.name)
                member.confirmed_at = self._fleet.time.now
        for pool in self._pools.values():
            await self._take(pool, await pool.reconcile(self._asked(pool)))

    def _connected(self, node: Node) -> bool:
        member = self._fleet.members.get(node)
        return member is not None and member.talks(self._fleet.time)

    def _asked(self, pool: Pool) -> Asked:
        entries = [
            entry
            for entry in self._book.entries.values()
            if entry.spec.pool == pool.name and entry.job.attached_node is None
        ]
        entries.sort(key=lambda entry: (-entry.spec.priority, entry.job.number))
        wants = (_want(entry) for entry in entries)
        members = [member for member in self._fleet.members.values() if member.pool == pool.name]
        return Asked(
            connected=self._connected,
            wants=tuple(want for want in wants if want is not None),
            cordoned=frozenset(member.name for member in members if member.life not in WORKING),
            drained={member.name: member.life_why for member in members if _for_good(member)},
        )

    async def _take(self, pool: Pool, told: Told) -> None:
        for entry in self._book.entries.values():
            if entry.spec.pool == pool.name:
                entry.lacks = told.waits.get(entry.job.id, "")
        members = self._fleet.members
        new = [known for known in told.nodes if known.name not in members]
        if new or told.news:
            await self._write(lambda writer: _note(writer, pool.name, new, told))
        for known in new:
            members[known.name] = Member(
                name=known.name, pool=pool.name, slots=known.slots, state=NodeState.GONE,
                heard_at=self._fleet.time.now,
            )  # fmt: skip
        for known in told.nodes:
            member = members[known.name]
            member.leaves, member.leaves_in_s = known.leaves, known.leaves_in_s


def _for_good(member: Member) -> bool:
    """A person drains it, or no repair has helped. What else it takes out may come back."""
    by_person = member.life_by not in {KEEPSTEP, f"pool {member.pool}"}
    drained = member.life in {LifeState.DRAINING, LifeState.QUARANTINED}
    return member.life is LifeState.REPLACE or (drained and by_person)


def _note(writer: Writer, pool: str, new: Iterable[Known], told: Told) -> None:
    for known in new:
        writer.upsert_node(
            known.name, pool=pool, role="run", slots=known.slots, state=NodeState.GONE,
            state_reason=_NO_AGENT,
        )  # fmt: skip
    for news in told.news:
        writer.add_event(NewEvent(kind=news.kind, text=news.text, node=news.node, job=news.job))


def _want(entry: Entry) -> Want | None:
    """A suspended job wants nothing until its attempt is over and it is to run again."""
    row, spec = entry.present, entry.spec
    if row is None and entry.job.wanted != "run":
        return None
    using = frozenset((*row.nodes, *row.spares)) if row is not None else frozenset[Node]()
    resources = spec.resources
    return Want(
        job=entry.job.id,
        nodes=resources.nodes,
        slots=resources.gpus_per_node,
        spares=resources.spares,
        labels=resources.labels,
        using=using,
    )
