"""The cycle: see, decide, write down, act. Woken by what agents report and what people ask, else each second.

A decision is written down before anything is done about it, and what is done follows from what is written: a
controller that dies between the two finds the desired state in its store and goes on from there.
"""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from keepstep.control import intake, stored
from keepstep.control.book import Book, Entry
from keepstep.control.commit import commit, mark
from keepstep.control.desired import Carriers, desired, keeps_snapshots
from keepstep.control.examination import examine
from keepstep.control.fleet import Fleet, Member, Session
from keepstep.control.health import Health
from keepstep.control.observed import ObservedTime
from keepstep.control.picture import draw
from keepstep.control.repair import Repairs
from keepstep.control.supply import Supply
from keepstep.control.validations import Validations
from keepstep.control.wards import Wards
from keepstep.core.clock import Clock
from keepstep.core.errors import Unreachable
from keepstep.core.ids import JobId, Node
from keepstep.core.rules import TriagePolicy
from keepstep.core.states import NODE, NodeState
from keepstep.core.states.table import UnknownTransition
from keepstep.decide import plan as p
from keepstep.decide.decide import decide
from keepstep.decide.view import Saving, View
from keepstep.pools.pool import Pool
from keepstep.store import Store, Writer
from keepstep.store.rows import NewEvent
from keepstep.wire import messages as wire

log = logging.getLogger(__name__)

TICK_S = 1.0
_BEAT_EVERY_S = 2.0
_REST_S = 0.01  # between two decisions, so that a burst of reports is one picture
_MISMATCHES_MAX = 5  # in a row: then it is a bug that only a person can mend
_ROUNDS_MAX = 20  # decisions in a row before agents are heard again

T = TypeVar("T")


class Controller:
    """Owns the fleet, the book and the cycle. Everything runs on one event loop but the store's calls."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        policy: p.Policy,
        pools: Iterable[Pool] = (),
        *,
        last_seen_at: float | None = None,
        health: Health | None = None,
        repairs: Repairs | None = None,
    ) -> None:
        """`last_seen_at`: when the controller before this one last moved its lease (wall time)."""
        self.store, self.clock, self.policy = store, clock, policy
        self._last_seen_at = last_seen_at
        self.pools = {pool.name: pool for pool in pools}
        self.time = ObservedTime(TICK_S)
        self.fleet = Fleet(self.time)
        self.book = Book(store, self.time)
        self.health = health or Health(clock)
        self.told = asyncio.Event()  # something new is in the timeline
        self.supply = Supply(self.fleet, self.book, self.pools, self.write)
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: set[JobId] = set()
        self._events: list[tuple[Member, Session, wire.Events]] = []
        self._started = 0.0
        self._key = secrets.token_bytes(32)
        self.wards = Wards(self.health, self.fleet, repairs or Repairs({}), self.write, self.begin)
        self.validations = Validations(self)
        self._trouble, self._mismatches = "", 0
        self.ready = False
        self._beaten = 0.0

    async def on_store(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """A call of the store on its own thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: call(*arguments, **named))

    async def write(self, write: Callable[[Writer], T], *, about: JobId | None = None) -> T:
        """One fenced transaction; then `about` is read again and the next decision comes at once."""

        def transaction() -> T:
            with self.store.transaction() as writer:
                return write(writer)

        async with self._writing:
            result = await self.on_store(transaction)
            if about is not None:
                await self.refresh(about)
        self.tell()
        self.wake()
        return result

    async def reload_policy(self, who: str) -> TriagePolicy:
        """Errors: InputError, and the old policy on node health stays in force."""
        found = self.health.reload()
        text = f"{who} had the policy on node health read anew: {found.source}"
        await self.write(lambda writer: writer.add_event(NewEvent(kind="policy", text=text, principal=who)))
        return found

    async def refresh(self, job: JobId) -> None:
        """Read a job again after something was written for it."""
        self.book.take(await self.on_store(self.book.read, job))

    @property
    def up_s(self) -> float:
        """Since it took its term."""
        return self.time.age(self._started)

    def wake(self) -> None:
        self._wake.set()

    def tell(self) -> None:
        self.told.set()
        self.told = asyncio.Event()

    # ------------------------------------------------------------ the cycle

    async def run(self) -> None:
        """Until cancelled. Errors: Fenced when another controller has taken the store over."""
        self._started = self.time.tick(self.clock.monotonic())
        self.fleet.load(await self.on_store(self.store.nodes))
        for rows in await self.on_store(self.book.read_all):
            self.book.take(rows)
        self.health.begin(await self.on_store(self.health.load, self.store), self.fleet)
        await self._note_absence()
        self.ready = True
        try:
            while True:
                await self._cycle_or_wait()
                await asyncio.sleep(_REST_S)
                try:
                    async with asyncio.timeout(TICK_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            for task in self._tasks:
                task.cancel()
            self._thread.shutdown(wait=True)

    async def _cycle_or_wait(self) -> None:
        """A store that cannot be written (a full disk, a lost server) is tried again; jobs go on."""
        try:
            await self._cycle()
            self._trouble, self._mismatches = "", 0
        except UnknownTransition as problem:
            # The world changed between the view and the writing of its plan. Look again, but not for ever.
            self._mismatches += 1
            log.exception("a plan did not fit: %s", problem)
            if self._mismatches > _MISMATCHES_MAX:
                raise
            for rows in await self.on_store(self.book.read_all):
                self.book.take(rows)
        except Unreachable as problem:
            if str(problem) != self._trouble:
                log.error("nothing is decided until the store answers: %s", problem)
            self._trouble = str(problem)
            await asyncio.sleep(TICK_S)

    async def _cycle(self) -> None:
        self._wake.clear()
        monotonic = self.clock.monotonic()
        self.time.tick(monotonic)
        if monotonic - self._beaten >= _BEAT_EVERY_S:
            self._beaten = monotonic
            await self.on_store(self.store.beat)
        await self._store_events()
        self.fleet.hang_up()
        await self.supply.ask()
        for _ in range(_ROUNDS_MAX):
            if not await self.health.look(self.fleet, self.book, self.write):
                break
        self.wards.reconcile()
        self.validations.reconcile()
        for _ in range(_ROUNDS_MAX):
            view = draw(self.book, self.fleet, wall=self.clock.wall(), up_s=self.up_s)
            plan = decide(view, self.policy)
            if not await self._take(plan, view):
                break
        await self._note_progress()
        self._apply()
        self.fleet.forget({str(job): entry.job.attempt for job, entry in self.book.entries.items()})

    async def _take(self, plan: p.Plan, view: View) -> bool:
        """Write the plan down and ask its questions. True if a new view may bring more."""
        changed: list[JobId] = []
        marked: dict[Node, tuple[NodeState, NodeState]] = {}
        jobs = {job.id: job for job in view.jobs}
        questions = (p.Collect, p.Examine, p.Save)
        writes = [c for c in plan.changes if not isinstance(c, questions) and self._is_news(c)]
        self._ask_and_note(plan)

        def transaction() -> None:
            with self.store.transaction() as writer:
                for change in writes:
                    commit(writer, self.book.entries[change.job], jobs[change.job], change)
                    changed.append(change.job)
                for node in plan.marks:
                    before = self.fleet.members[node.node].state
                    if NODE.allows(before, node.event):  # else it came back meanwhile: the next view says
                        marked[node.node] = before, mark(writer, node, before)

        if not writes and not plan.marks:
            return False
        async with self._writing:
            await self.on_store(transaction)
            for job in dict.fromkeys(changed):
                await self.refresh(job)
        for name, (before, after) in marked.items():
            member = self.fleet.members[name]
            if member.state is before:  # else it registered while this was written
                member.state, member.ready_at = after, self.time.now
        for change in writes:
            if isinstance(change, p.End) and change.moves:
                self.book.entries[change.job].grace = change.attempt, change.grace_s
            if isinstance(change, p.Find):
                self.book.entries[change.job].found[change.verdict.signature] = self.time.now
            log.info("%s: %s: %s", change.job, type(change).__name__, change.reason)
        self.tell()
        return any(not isinstance(change, p.Wait) for change in writes)

    def _ask_and_note(self, plan: p.Plan) -> None:
        """What needs no writing down: questions, and until when a reason holds."""
        for change in plan.changes:
            entry = self.book.entries[change.job]
            match change:
                case p.Collect():
                    self._ask(change)
                case p.Examine() if not entry.examining:
                    entry.examining = True
                    self.begin(examine(self.fleet, entry, change, term=self.store.term, told=self.wake))
                case p.Save() if entry.saving is None or entry.saving[1].at != change.at:
                    entry.saving = self.time.now, Saving(at=change.at)
                    work = stored.save(self.fleet, entry, change, term=self.store.term, tell=self._note)
                    self.begin(work)
                case p.Wait():
                    entry.due = change.reason, self.time.now + change.due_s

    def _is_news(self, change: p.JobChange) -> bool:
        return not isinstance(change, p.Wait) or change.reason != self.book.entries[change.job].job.reason

    def _apply(self) -> None:
        for member in self.fleet.members.values():
            if member.session is None or member.register is None:
                continue
            wanted = desired(member, self.book.entries, self.store.term, self.policy, self._carriers)
            if wanted != member.desired:
                member.desired = wanted
                member.session.send(wanted)

    def _carriers(self, entry: Entry) -> Carriers:
        """A controller's restart renews the secret; carriers know the one before, too."""
        if not keeps_snapshots(entry.spec):
            return Carriers()
        job = entry.job.id
        secret = hmac.new(self._key, job.encode(), "sha256").hexdigest()
        return Carriers(secret=secret, addresses=self.fleet.carriers(job))

    # ------------------------------------------------------------ agents

    def registered(self, register: wire.Register, session: Session) -> Member:
        """An agent is there, or there again, with its present state."""
        member = self.fleet.register(register, session)
        intake.resume(self.book, self.fleet, member)
        intake.follow(self.book, self.fleet, member)
        self.health.hear(member, member.health)
        self.wake()
        return member

    def heard(self, member: Member, state: wire.State) -> None:
        changed = self.fleet.hear(member, state)
        changed = self.health.hear(member, state.health) or changed
        if intake.follow(self.book, self.fleet, member) or changed:
            self.wake()

    def events(self, member: Member, session: Session, events: wire.Events) -> None:
        self._events.append((member, session, events))
        self.wake()

    def _news(self, member: Member, events: wire.Events) -> list[wire.Event]:
        """Without those that were stored already and only their acknowledgement was lost."""
        assert member.register is not None
        if member.events_of != member.register.instance:
            member.events_of, member.event = member.register.instance, 0
        return [event for event in events.events if event.number > member.event]

    async def _store_events(self) -> None:
        batch, self._events = self._events, []
        if not batch:
            return
        known = {str(job) for job in self.book.entries}
        news = [(member, self._news(member, events)) for member, _, events in batch]

        def transaction() -> None:
            with self.store.transaction() as writer:
                for member, events in news:
                    jobs = {event.job for event in events}
                    finished = {job for job in jobs - known if intake.exists(writer, job)}
                    intake.write_events(writer, member, events, known | finished)

        async with self._writing:
            await self.on_store(transaction)
        for member, session, events in batch:
            if events.events:
                member.event = max(member.event, *(event.number for event in events.events))
                session.send(wire.Acknowledge(sequence=member.sequence, event=member.event))
        self.tell()

    async def _note(self, event: NewEvent) -> None:
        await self.write(lambda writer: writer.add_event(event))

    async def _note_absence(self) -> None:
        """Running jobs went on while no controller saw them: that time is unobserved."""
        running = [entry for entry in self.book.entries.values() if entry.present is not None]
        if self._last_seen_at is None or not running:
            return
        away_s = max(0.0, self.clock.wall() - self._last_seen_at)

        def write(writer: Writer) -> None:
            for entry in running:
                writer.add_event(
                    NewEvent(
                        kind="unobserved",
                        text=f"there was no controller for {away_s:.1f} s",
                        job=entry.job.id,
                        attempt=entry.job.attempt,
                        data={"seconds": away_s},
                    )
                )

        await self.write(write)

    async def _note_progress(self) -> None:
        """The moment at which an attempt has come past everything that was done before it."""
        for entry in list(self.book.entries.values()):
            progress = entry.progress
            if progress.step <= entry.steps_done:
                continue
            if progress.replaying and progress.stepped:
                progress.replaying = False
                await self.write(lambda writer, entry=entry: intake.progressed(writer, entry))  # type: ignore[misc]
            entry.steps_done = progress.step

    def _ask(self, question: p.Collect) -> None:
        entry = self.book.entries[question.job]
        if question.job in self._asking:
            return
        self._asking.add(question.job)
        entry.asked[question.node] = (question.kind, self.time.now)
        work = stored.inventory(self.fleet, entry, question, term=self.store.term, told=self.wake)
        self.begin(work).add_done_callback(lambda _: self._asking.discard(question.job))

    def begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Something that goes on beside the cycle, and ends with it at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
