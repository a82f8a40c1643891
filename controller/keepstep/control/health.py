"""Looks after the nodes: reports of their health in, their lives written down, repairs begun.

Deciding is `keepstep.decide.ward`; here is what it needs of the world. **Health time** is what lives count
by: the controller's monotonic seconds, carried on over restarts in the store. Between controllers it moves
by what the wall clock says, never backwards and never more than a day, so a clock that jumps changes little.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from keepstep.control.book import Book
from keepstep.control.fleet import Fleet, Member
from keepstep.control.reported import ATTACHED, Reported
from keepstep.core.clock import Clock
from keepstep.core.errors import InputError, NotFound, Refused
from keepstep.core.ids import JobId, Node
from keepstep.core.rules import TriagePolicy
from keepstep.core.states import LifeState, NodeState
from keepstep.decide.asked import Wish, granted, standing
from keepstep.decide.breaker import Sizes
from keepstep.decide.life import Life
from keepstep.decide.lifecycle import Situation, untested, validated
from keepstep.decide.ward import Looked, Told, Ward
from keepstep.spec.rules import load_rules
from keepstep.store import Writer
from keepstep.store.reader import Reader
from keepstep.store.rows import NewEvent
from keepstep.wire.health import HealthStatus

log = logging.getLogger(__name__)

_TIME = "health time"  # the store's key: seconds, and the wall clock then
_AWAY_MAX_S = 86_400.0
_SAVE_EVERY_S = 20.0
_OVER = {"dead", "refused"}

Write = Callable[[Callable[[Writer], Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What one validation of a node came to. `figures`: what it measured, for comparison with others."""

    passed: bool
    tested: bool = True  # False: nothing could be, which says nothing of the node
    text: str = ""
    job: str = ""  # that ran it
    figures: Mapping[str, Any] = field(default_factory=dict)


class Health:
    """The lives of all nodes, and what was reported since the last look."""

    def __init__(self, clock: Clock, policy_file: Path | None = None) -> None:
        """Errors: InputError where the policy cannot be used."""
        self.clock, self.policy_file = clock, policy_file
        self.ward = Ward(policy=load_rules(policy_file))
        self.decisions: Counter[tuple[str, str]] = Counter()  # by rule and action, of this controller
        self.reported = Reported()
        self._unsaved: set[Node] = set()
        self._base, self._began, self._saved = 0.0, clock.monotonic(), 0.0

    # ------------------------------------------------------------ time and policy

    @property
    def now(self) -> float:
        """Health time."""
        return self._base + self.clock.monotonic() - self._began

    @property
    def policy(self) -> TriagePolicy:
        return self.ward.policy

    def reload(self) -> TriagePolicy:
        """Read the policy anew. Errors: InputError, and the old one stays in force."""
        self.ward.policy = load_rules(self.policy_file)
        log.info("policy on node health: %s, %d rules", self.policy.source, len(self.policy.rules))
        return self.policy

    def load(self, store: Reader) -> list[Life]:
        """On the store's thread: everything that is remembered."""
        said = store.meta(_TIME).split()
        if len(said) == 2:
            away_s = self.clock.wall() - float(said[1])
            self._saved = float(said[0])
            self.reported = Reported(watched_until=self._saved)
            self._base = self._saved + min(max(away_s, 0.0), _AWAY_MAX_S)
            self._began = self.clock.monotonic()
        return [from_data(row.data) for row in store.lives()]

    def begin(self, lives: Iterable[Life], fleet: Fleet) -> None:
        self.ward = Ward.remembered(self.policy, lives, self.now)
        for life in self.ward.lives.values():
            self._show(fleet, life)

    def hear(self, member: Member, status: HealthStatus | None) -> bool:
        """Keep the newest report. True if it should be looked at now."""
        return self.reported.hear(member, status, self.ward, self.now)

    # ------------------------------------------------------------ looking and writing down

    async def look(self, fleet: Fleet, book: Book, write: Write) -> bool:
        """One look, written down and taken over. True if another one may bring more."""
        now, statuses = self.now, dict(self.reported.statuses)
        reports = self.reported.taken(fleet, self.ward, now)
        saving = now - self._saved >= _SAVE_EVERY_S
        going = [member.name for member in fleet.members.values() if member.leaves]
        if not (reports or self.ward.busy or going or saving):
            return False
        places = _Places(fleet, book, self.policy.correlation.rack_label)
        looked = self.ward.look(reports, places.situation, places.sizes(), now, going)
        if looked.urgent or looked.told or saving:
            nodes = {**{n: self.ward.life(n) for n in self._unsaved}, **looked.lives}
            await write(lambda writer: self._write(writer, nodes.values(), looked.told, now))
            self._unsaved.clear()
            self._saved = now
        else:
            self._unsaved |= set(looked.lives)
        self._take(looked, fleet, now)
        self.reported.looked_at(statuses)
        return looked.moved

    def _take(self, looked: Looked, fleet: Fleet, now: float) -> None:
        self.ward.take(looked, now)
        for told in looked.told:
            if told.action:
                self.decisions[told.rule, told.action] += 1
            log.info("%s: %s: %s", told.node or told.job, told.kind, told.text)
        for node in {*looked.lives, *self.ward.busy}:
            self._show(fleet, self.ward.life(node))

    def _show(self, fleet: Fleet, life: Life) -> None:
        """What placement and draining see of a life."""
        member = fleet.members.get(life.node)
        if member is not None:
            drains = life.state is LifeState.DRAINING and life.due is not None
            member.life, member.life_why, member.life_by = life.state, life.reason, life.owner
            member.drain_s = max(0.0, (life.due or 0.0) - self.now) if drains else None

    def _write(self, writer: Writer, lives: Iterable[Life], told: Iterable[Told], now: float) -> None:
        for life in lives:
            save(writer, life)
        for one in told:
            writer.add_event(NewEvent(kind=one.kind, text=one.text, node=one.node, job=one.job))
        writer.set_meta(_TIME, f"{now!r} {self.clock.wall()!r}")

    # ------------------------------------------------------------ what people and hooks change

    async def ask(self, fleet: Fleet, name: str, wish: Wish, write: Write) -> Life:
        """A person's wish. Errors: NotFound, Refused with who was first."""
        member = fleet.members.get(Node(name))
        if member is None:
            known = ", ".join(sorted(fleet.members)) or "none"
            raise NotFound(f"there is no node {name!r}", next=f"Known nodes: {known}.")

        def change(life: Life) -> Life:
            return granted(life, wish, self.policy, self.now)

        text = f"{wish.verb} by {wish.who}" + (f": {wish.reason}" if wish.reason else "")
        return await self.change(fleet, member.name, change, f"node {wish.verb}", text, write, wish.who)

    async def validation(
        self, fleet: Fleet, node: Node, came: Validation, write: Write, who: str = ""
    ) -> Life:
        """What a validation came to moves the node's life on. Errors: Refused where it is not validating."""

        def change(life: Life) -> Life:
            if life.state is not LifeState.VALIDATING:
                raise Refused(f"node {node} is not validating", why=f"it is {standing(life)}")
            if not came.tested:
                return untested(life, why=came.text, now=self.now).life
            return validated(life, passed=came.passed, why=came.text, policy=self.policy, now=self.now).life

        def note(writer: Writer) -> None:
            writer.add_validation(
                node, job=came.job, passed=came.passed, text=came.text, figures=came.figures
            )

        if not came.tested:
            text = f"nothing could be tested: {came.text}"
            return await self.change(fleet, node, change, "node quarantined", text, write, who)
        outcome = "passed" if came.passed else "failed"
        text = f"validation {outcome}{f': {came.text}' if came.text else ''}"
        return await self.change(fleet, node, change, "node validated", text, write, who, note)

    async def change(
        self,
        fleet: Fleet,
        node: Node,
        change: Callable[[Life], Life],
        kind: str,
        text: str,
        write: Write,
        who: str = "",
        also: Callable[[Writer], None] | None = None,
    ) -> Life:
        """Change one life: decided on the store's thread, inside the lock, by what it is at that moment."""
        changed: list[Life] = []

        def writing(writer: Writer) -> None:
            before = self.ward.life(node)
            after = change(before)
            if after != before:
                save(writer, after)
                writer.add_event(NewEvent(kind=kind, text=text, node=node, principal=who))
                if also is not None:
                    also(writer)
                writer.set_meta(_TIME, f"{self.now!r} {self.clock.wall()!r}")
            changed.append(after)
            self.ward.take(Looked(lives={node: after}), self.now)

        await write(writing)
        self._show(fleet, changed[0])
        return changed[0]


def save(writer: Writer, life: Life) -> None:
    writer.save_life(
        life.node, state=life.state, owner=life.owner, reason=life.reason, revision=life.revision,
        data=msgspec.to_builtins(life),
    )  # fmt: skip


def from_data(data: Mapping[str, Any]) -> Life:
    """A life as it was saved. Fields that this version does not know are passed over."""
    try:
        return msgspec.convert(data, Life)
    except msgspec.ValidationError as problem:
        where = f"life of node {data.get('node')}"
        raise InputError("the store has a life that cannot be read", where=where, why=str(problem)) from None


class _Places:
    """What is on each node now, put together once for a look."""

    def __init__(self, fleet: Fleet, book: Book, rack_label: str) -> None:
        self._fleet, self._rack_label = fleet, rack_label
        self._jobs: dict[Node, JobId] = {}
        self._sizes: dict[JobId, int] = {}
        for entry in book.entries.values():
            if entry.present is not None and not entry.spec.validates:
                self._jobs.update(dict.fromkeys(entry.present.nodes, entry.job.id))
                self._sizes[entry.job.id] = len(entry.present.nodes)

    def situation(self, node: Node) -> Situation:
        member = self._fleet.members.get(node)
        if member is None:
            return Situation(connected=False)
        left = [heard for key, heard in member.attempts.items() if key in member.current]
        idle = node not in self._jobs and all(heard.status.phase in _OVER for heard in left)
        return Situation(
            idle=idle,
            job=self._jobs.get(node),
            connected=member.talks(self._fleet.time),
            rack=member.labels.get(self._rack_label, ""),
            gpus=tuple(sorted(member.register.gpus)) if member.register else (),
            pool=member.pool,
            leaves=member.leaves,
            leaves_in_s=member.leaves_in_s,
        )

    def sizes(self) -> Sizes:
        racks: Counter[str] = Counter()
        fleet = 0
        for member in self._fleet.members.values():
            if member.pool != ATTACHED and member.state is not NodeState.GONE:
                fleet += 1
                racks[member.labels.get(self._rack_label, "")] += 1
        return Sizes(fleet=fleet, racks=racks, jobs=self._sizes)
