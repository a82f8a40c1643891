"""The fleet as it is now: every node that registered, its connection, and what it last said.

The latest state of a node wins; nothing here is a history. A node is never forgotten while a job names it:
what it last reported stays, marked as no longer current.
"""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from keepstep.control.observed import ObservedTime
from keepstep.core.durations import COMPUTING_FLOOR_S, HELD_S
from keepstep.core.errors import TimedOut, Unreachable
from keepstep.core.ids import Node
from keepstep.core.states import NODE, LifeState, NodeEvent, NodeState
from keepstep.store.rows import NodeRow
from keepstep.wire import messages as wire
from keepstep.wire.health import HealthStatus

QUIET_S = 3.0  # an agent reports each second; after this a connection is open in name only
_FINISHED_KEPT = 100  # reports of one node, for those who look at a job after its end
_HANG_UP_S = 30.0  # and after this it is closed: its agent comes back over another one


class Session(Protocol):
    """One connection of one agent. `send` only queues; the latest `Desired` replaces an unsent one."""

    def send(self, message: wire.Message) -> None: ...

    def close(self, why: str) -> None: ...


@dataclass(slots=True)
class Heard:
    """What a node said of one attempt, and when (observed time)."""

    status: wire.AttemptStatus
    at: float
    dead_at: float | None = None  # when its death was first heard of


@dataclass(slots=True)
class Member:
    name: Node
    pool: str = ""
    slots: int = 0
    state: NodeState = NodeState.READY
    life: LifeState = LifeState.HEALTHY  # as control.health has it
    life_why: str = ""
    life_by: str = ""
    drain_s: float | None = None
    health: HealthStatus | None = None  # as it was last reported; None: its agent has no probes
    leaves: str = ""  # its pool will take it away: why, and when
    leaves_in_s: float | None = None
    confirmed: str = ""
    confirmed_at: float = 0.0
    register: wire.Register | None = None
    session: Session | None = None
    heard_at: float = 0.0
    ready_at: float = 0.0  # since it has been ready without a break
    acknowledged_at: float = 0.0  # when the last acknowledgement was sent: its lease runs from there
    reset: bool = False
    leaving: bool = False  # it said so last
    node: wire.NodeStatus = field(default_factory=wire.NodeStatus)
    standbys: tuple[wire.StandbyStatus, ...] = ()
    snapshots: tuple[wire.SnapshotStatus, ...] = ()
    attempts: dict[tuple[str, int], Heard] = field(default_factory=dict)
    current: frozenset[tuple[str, int]] = frozenset()  # reported over the present connection
    sequence: int = 0
    event: int = 0  # the newest that is stored, of the instance `events_of`
    events_of: str = ""
    asked: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    desired: wire.Desired | None = None  # as it was last sent over this connection

    def talks(self, time: ObservedTime) -> bool:
        """Its connection is open and has brought a word lately: a lost host never closes its connection."""
        return self.session is not None and time.age(self.heard_at) < QUIET_S

    @property
    def labels(self) -> dict[str, str]:
        return self.register.labels if self.register else {}


class Fleet:
    def __init__(self, time: ObservedTime) -> None:
        self.time = time
        self.members: dict[Node, Member] = {}
        self._question = 0

    def load(self, rows: list[NodeRow]) -> None:
        """After a controller's start: known nodes are silent until they come back."""
        for row in rows:
            self.members[row.name] = Member(
                name=row.name,
                pool=row.pool,
                slots=row.slots,
                state=NodeState(row.state),
                heard_at=self.time.now,
            )

    def register(self, register: wire.Register, session: Session) -> Member:
        name = Node(register.node)
        member = self.members.setdefault(name, Member(name=name))
        if member.session is not None and member.session is not session:
            member.session.close(f"agent instance {register.instance} has taken node {name} over")
        self._forget_questions(member, "the agent came back over a new connection")
        member.session, member.register = session, register
        member.pool, member.slots = register.pool, register.slots
        member.state = NODE.next(member.state, NodeEvent.REGISTER)
        member.confirmed, member.reset, member.desired = "", False, None
        member.sequence, member.current, member.leaving = 0, frozenset(), False
        member.ready_at = self.time.now
        member.heard_at = self.time.now
        if register.state is not None:
            self.hear(member, register.state)
        return member

    def hear(self, member: Member, state: wire.State) -> bool:
        """Take a node's state over. True if something changed that a decision may depend on."""
        if state.sequence < member.sequence:
            return False
        member.heard_at = self.time.now
        member.sequence = state.sequence
        changed = state.standbys != member.standbys or state.leaving
        changed = changed or _carriers(state.snapshots) != _carriers(member.snapshots)
        member.snapshots = state.snapshots
        member.node, member.standbys, member.leaving = state.node, state.standbys, state.leaving
        member.health = state.health
        keys = frozenset((status.job, status.attempt) for status in state.attempts)
        changed = changed or keys != member.current
        for status in state.attempts:
            key = status.job, status.attempt
            before = member.attempts.get(key)
            changed = changed or before is None or _matters(before.status) != _matters(status)
            if before is not None and before.status.phase == "dead" != status.phase:
                continue  # an attempt is started at most once: its death is for good
            dead_at = self.time.now if status.phase == "dead" else None
            member.attempts[key] = Heard(status, self.time.now, (before and before.dead_at) or dead_at)
        member.current = keys
        return changed

    def close(self, member: Member, session: Session) -> None:
        """The connection is gone; the node may be well."""
        if member.session is session:
            member.session, member.reset = None, True
            member.current = frozenset()
            self._forget_questions(member, "its connection was lost")

    def hang_up(self) -> None:
        """Close connections over which nothing came for long."""
        for member in self.members.values():
            if member.session is not None and self.time.age(member.heard_at) >= _HANG_UP_S:
                member.session.close(f"nothing was heard for {_HANG_UP_S:g} s")
                self.close(member, member.session)

    def forget(self, present: Mapping[str, int]) -> None:
        """Drop reports of attempts that a newer one has followed; of finished jobs keep a bounded number."""
        for member in self.members.values():
            for job, attempt in list(member.attempts):
                over = attempt < present[job] if job in present else len(member.attempts) > _FINISHED_KEPT
                if over and (job, attempt) not in member.current:
                    del member.attempts[job, attempt]

    def parts(self, job: str, attempt: int) -> Iterator[tuple[Member, Heard, bool]]:
        for member in self.members.values():
            heard = member.attempts.get((job, attempt))
            if heard is not None:
                yield member, heard, (job, attempt) in member.current

    def carriers(self, job: str) -> dict[str, tuple[str, int]]:
        """Where the carriers of a job listen, by node."""
        return {
            str(member.name): status.address
            for member in self.members.values()
            for status in member.snapshots
            if status.job == job
        }

    async def ask(self, name: Node, kind: str, params: dict[str, Any], *, term: int, within_s: float) -> Any:
        """A node's answer to a query. Errors: Unreachable, TimedOut."""
        member = self.members.get(name)
        if member is None or member.session is None:
            raise Unreachable(f"node {name} is not connected", next=f"keepstep node describe {name}")
        self._question += 1
        number = self._question
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        member.asked[number] = future
        member.session.send(wire.Query(id=number, kind=kind, term=term, params=params))
        try:
            async with asyncio.timeout(within_s):
                return await future
        except TimeoutError:
            raise TimedOut(f"node {name} did not answer `{kind}` within {within_s:g} s") from None
        finally:
            member.asked.pop(number, None)

    def answer(self, member: Member, answer: wire.Answer) -> None:
        future = member.asked.get(answer.id)
        if future is not None and not future.done():
            if answer.error:
                future.set_exception(Unreachable(answer.error, where=f"node {member.name}"))
            else:
                future.set_result(answer.data)

    @staticmethod
    def _forget_questions(member: Member, why: str) -> None:
        for future in member.asked.values():
            if not future.done():
                future.set_exception(Unreachable(why, where=f"node {member.name}"))


def _carriers(snapshots: tuple[wire.SnapshotStatus, ...]) -> object:
    """What other nodes must be told; what is held is looked at when it is needed."""
    return [(status.job, status.address, status.after) for status in snapshots]


def _matters(status: wire.AttemptStatus) -> object:
    """The part of a report that decisions turn on: not the ages, not each step."""
    ranks = tuple((r.rank, r.state, r.exit_code, r.signal, r.step >= 0, *_trouble(r)) for r in status.ranks)
    return status.phase, status.alive == 0, status.master, status.reason, ranks


def _trouble(rank: wire.RankStatus) -> tuple[str, bool, float]:
    """A process that does not run, and stillness: each report of it is news once it may be a hang."""
    odd = rank.process if rank.process not in {"running", "blocked"} else ""
    still_s = rank.still_s or 0.0
    return odd, bool(odd) and rank.process_s >= HELD_S, still_s if still_s >= COMPUTING_FLOOR_S else 0.0
