"""What pools are asked and what they tell: which jobs need nodes, which nodes there could be or will go."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from keepstep.control.book import Book, Entry
from keepstep.control.fleet import Fleet, Member
from keepstep.core.ids import Node
from keepstep.core.states import NodeState
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
        members = self._fleet.members.values()
        cordoned = frozenset(m.name for m in members if m.pool == pool.name and m.cordoned)
        return Asked(
            connected=self._connected,
            wants=tuple(want for want in wants if want is not None),
            cordoned=cordoned,
        )

    async def _take(self, pool: Pool, told: Told) -> None:
        for entry in self._book.entries.values():
            if entry.spec.pool == pool.name:
                entry.lacks = told.waits.get(entry.job.id, "")
        members = self._fleet.members
        new = [known for known in told.nodes if known.name not in members]
        going = [known for known in told.nodes if known not in new and self._goes(members[known.name], known)]
        staying = [
            members[known.name]
            for known in told.nodes
            if not known.leaves and known not in new and members[known.name].cordoned_by == pool.name
        ]
        if not (new or going or staying or told.news):
            return

        def write(writer: Writer) -> None:
            for known in new:
                writer.upsert_node(
                    known.name, pool=pool.name, role="run", slots=known.slots, state=NodeState.GONE,
                    state_reason=_NO_AGENT,
                )  # fmt: skip
            for known in going:
                why = _told(known)
                writer.upsert_node(known.name, cordoned=True, cordon_reason=why, cordoned_by=pool.name)
                writer.add_event(NewEvent(kind="node leaves", text=f"{known.name}: {why}", node=known.name))
            for member in staying:
                writer.upsert_node(member.name, cordoned=False, cordon_reason="", cordoned_by="")
                text = f"{member.name} is back to stay"
                writer.add_event(NewEvent(kind="node uncordon", text=text, node=member.name))
            for news in told.news:
                writer.add_event(NewEvent(kind=news.kind, text=news.text, node=news.node, job=news.job))

        await self._write(write)
        for known in new:
            members[known.name] = Member(
                name=known.name, pool=pool.name, slots=known.slots, state=NodeState.GONE,
                heard_at=self._fleet.time.now,
            )  # fmt: skip
        for known in going:
            members[known.name].cordoned, members[known.name].cordoned_by = True, pool.name
        for member in staying:
            member.cordoned, member.cordoned_by = False, ""

    @staticmethod
    def _goes(member: Member, known: Known) -> bool:
        """Takes over what the pool says of its going. True: it is not cordoned for that yet."""
        member.leaves, member.leaves_in_s = known.leaves, known.leaves_in_s
        return bool(known.leaves) and not member.cordoned


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


def _told(known: Known) -> str:
    within = "" if known.leaves_in_s is None else f", within {known.leaves_in_s:.0f} s"
    return f"{known.leaves}{within}"
