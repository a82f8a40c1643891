"""A small world for decisions: gangs that step, agents, nodes that die or fall silent, one controller.

Time moves in whole seconds. What is true (`World`) and what the controller knows of it (`Controller`) are
kept apart; only reports and commands that get through connect them. Nothing here judges: the checkers do.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from keepstep.core.ids import Attempt, JobId, Node, Rank, Step
from keepstep.core.job import JobSpec
from keepstep.core.layout import local_ranks
from keepstep.core.states import ATTEMPT, JOB, NODE, AttemptEvent, JobEvent, JobState, NodeEvent, NodeState
from keepstep.decide import plan as p
from keepstep.decide.decide import decide
from keepstep.decide.silence import Silence
from keepstep.decide.view import (
    Asked,
    AttemptView,
    Ended,
    Failure,
    Inventory,
    JobView,
    NodeView,
    PartPhase,
    PartView,
    RankPhase,
    RankView,
    Stored,
    View,
    Wanted,
)

Key = tuple[JobId, Attempt]
WRITE_S = 12  # between a writer's look at the fence and its commit


@dataclass(kw_only=True)
class Gang:
    """One attempt as it really is. `path` names the attempt that computed each step of its state."""

    job: JobId
    attempt: Attempt
    spec: JobSpec
    nodes: tuple[Node, ...]
    path: list[Attempt]
    started: bool = False
    steps_here: int = 0
    writing: tuple[int, int] | None = None  # (step, when it commits)
    finished: bool = False


@dataclass(kw_only=True)
class Part:
    """A gang's share of one node, as it really is."""

    phase: PartPhase = PartPhase.PREPARING
    ranks: dict[Rank, RankView] = field(default_factory=dict)
    prepared_at: int = 0
    alone_s: int = 0  # without the controller
    still_s: int = 0  # without a step

    @property
    def alive(self) -> int:
        return sum(rank.phase is not RankPhase.EXITED for rank in self.ranks.values())


@dataclass(kw_only=True)
class Host:
    name: Node
    up: bool = True
    cut_until: int = 0  # no packet passes before
    died_at: int = 0
    back_at: int | None = None
    parts: dict[Key, Part] = field(default_factory=dict)

    def end(self, key: Key, signal: int, now: int) -> None:
        part = self.parts[key]
        for number, rank in part.ranks.items():
            if rank.phase is not RankPhase.EXITED:
                order = 1 + sum(one.phase is RankPhase.EXITED for one in part.ranks.values())
                exited = replace(rank, phase=RankPhase.EXITED, signal=signal, exit_order=order)
                part.ranks[number] = replace(exited, exited_age_s=float(now))  # its moment; aged in reports
        part.phase = PartPhase.DEAD


@dataclass(kw_only=True)
class World:
    hosts: dict[Node, Host]
    gangs: dict[Key, Gang] = field(default_factory=dict)
    stored: dict[JobId, dict[Stored, tuple[Attempt, ...]]] = field(default_factory=dict)
    fence: dict[JobId, Attempt] = field(default_factory=dict)
    now: int = 0

    def part(self, gang: Gang, node: Node) -> Part | None:
        host = self.hosts[node]
        return host.parts.get((gang.job, gang.attempt)) if host.up else None

    def whole(self, gang: Gang) -> bool:
        """Every rank of it runs."""
        parts = [self.part(gang, node) for node in gang.nodes]
        return all(
            part is not None
            and part.ranks
            and all(rank.phase is RankPhase.RUNNING for rank in part.ranks.values())
            for part in parts
        )

    def running_ranks(self, gang: Gang) -> int:
        parts = [self.part(gang, node) for node in gang.nodes]
        return sum(
            rank.phase is RankPhase.RUNNING
            for part in parts
            if part is not None
            for rank in part.ranks.values()
        )

    def advance(self) -> None:
        self.now += 1
        for host in self.hosts.values():
            if not host.up and host.back_at is not None and self.now >= host.back_at:
                host.up, host.back_at = True, None
        for gang in self.gangs.values():
            self._step(gang)
            self._write(gang)
        for host in self.hosts.values():
            if host.up:
                for key in list(host.parts):
                    self._agent_alone(host, key)

    def _step(self, gang: Gang) -> None:
        if not gang.started or gang.finished or not self.whole(gang):
            return
        gang.path.append(gang.attempt)
        gang.steps_here += 1
        for node in gang.nodes:
            part = self.hosts[node].parts[gang.job, gang.attempt]
            part.still_s = 0 if shows_steps(gang.spec) else part.still_s
            for number, rank in part.ranks.items():
                part.ranks[number] = replace(rank, step=len(gang.path))
        due = len(gang.path) % 5 == 0 and gang.spec.run.kind == "llama" and gang.writing is None
        if due and self.fence.get(gang.job, gang.attempt) == gang.attempt:
            gang.writing = (len(gang.path), self.now + WRITE_S)
        if len(gang.path) >= steps_of(gang.spec):
            gang.finished = True
            for node in gang.nodes:
                part = self.hosts[node].parts[gang.job, gang.attempt]
                for number, rank in part.ranks.items():
                    done = replace(rank, phase=RankPhase.EXITED, exit_code=0, exited_age_s=float(self.now))
                    part.ranks[number] = done
                part.phase = PartPhase.DEAD

    def _write(self, gang: Gang) -> None:
        """Rank 0 commits what it began, if it still lives: the fence was looked at before."""
        if gang.writing is None:
            return
        step, at = gang.writing
        first = self.part(gang, gang.nodes[0])
        if first is None or first.phase is PartPhase.DEAD:
            gang.writing = None
        elif self.now >= at:
            at_point = Stored(attempt=gang.attempt, step=Step(step))
            self.stored.setdefault(gang.job, {})[at_point] = tuple(gang.path[:step])
            gang.writing = None

    def _agent_alone(self, host: Host, key: Key) -> None:
        """What an agent does by itself: nothing but its own safety."""
        part, gang = host.parts[key], self.gangs[key]
        part.alone_s += 1
        part.still_s += 1
        recovery = gang.spec.recovery
        fenced = gang.spec.run.kind == "llama" or recovery.fenced
        if part.phase is not PartPhase.RUNNING:
            return
        if not fenced and min(part.alone_s, part.still_s) >= recovery.self_fence_s:
            host.end(key, 9, self.now)
        elif part.alone_s >= recovery.orphan_lease_s:
            named = self.fence.get(key[0], key[1]) == key[1]
            if gang.spec.run.kind == "llama" and named and part.still_s <= 1:
                part.alone_s = 0  # it renews its lease by itself
            else:
                host.end(key, 9, self.now)

    # ------------------------------------------------------------------ commands that get through

    def prepare(self, host: Host, gang: Gang, rank: int) -> None:
        """At most once."""
        key = (gang.job, gang.attempt)
        if key in host.parts:
            return
        numbers = local_ranks(len(gang.nodes) * 2, len(gang.nodes), rank)
        ranks = {Rank(n): RankView(rank=Rank(n), phase=RankPhase.WAITING) for n in numbers}
        host.parts[key] = Part(ranks=ranks, prepared_at=self.now + 1 + rank)
        if rank == 0 and gang.spec.run.kind == "llama":
            self.fence[gang.job] = max(self.fence.get(gang.job, Attempt(0)), gang.attempt)

    def go(self, host: Host, key: Key) -> bool:
        part = host.parts.get(key)
        if part is None or part.phase is not PartPhase.PREPARED:
            return False
        part.phase = PartPhase.RUNNING
        step = len(self.gangs[key].path)
        for number, rank in part.ranks.items():
            part.ranks[number] = replace(rank, phase=RankPhase.RUNNING, step=step)
        self.gangs[key].started = True
        return True

    def stop(self, host: Host, key: Key) -> None:
        if key not in host.parts:
            host.parts[key] = Part(phase=PartPhase.DEAD)
        elif host.parts[key].phase is not PartPhase.DEAD:
            host.end(key, 9, self.now)


def steps_of(spec: JobSpec) -> int:
    return spec.run.steps if spec.run.kind == "llama" else 100


def shows_steps(spec: JobSpec) -> bool:
    return not spec.name.startswith("blind")


@dataclass(kw_only=True)
class Known:
    """What the controller knows of a node."""

    state: NodeState = NodeState.READY
    connected: bool = False
    silence: Silence = field(default_factory=Silence)
    ready: Silence = field(default_factory=Silence)
    confirmed: str = ""
    told: dict[Key, tuple[PartPhase, tuple[RankView, ...], int]] = field(default_factory=dict)
    heard: set[Key] = field(default_factory=set)


@dataclass(kw_only=True)
class Timers:
    """Ages of a job, by the rule for late observers."""

    state: Silence = field(default_factory=Silence)
    step: Silence = field(default_factory=Silence)
    still: Silence = field(default_factory=Silence)
    queued: Silence = field(default_factory=Silence)
    up: Silence = field(default_factory=Silence)
    seen_step: int = -1
    dead: int = 0


@dataclass(kw_only=True)
class Controller:
    world: World
    policy: p.Policy
    jobs: dict[JobId, JobView]
    known: dict[Node, Known]
    timers: dict[JobId, Timers] = field(default_factory=dict)
    up: Silence = field(default_factory=Silence)
    ticked: int = 0
    away_until: int = 0
    confirms: dict[Node, int] = field(default_factory=dict)  # when a dead node's death becomes known
    witness: Callable[["Controller", View, p.Plan], None] = lambda *_: None  # sees a plan before it is taken

    def restart(self, away_s: int) -> None:
        """All that was only in memory is forgotten."""
        self.away_until = self.world.now + away_s
        self.up = Silence()
        self.timers = {}
        for node, known in self.known.items():
            self.known[node] = Known(state=known.state)
        self.jobs = {name: replace(job, asked=(), inventory=None) for name, job in self.jobs.items()}

    def tick(self) -> None:
        now, late = self.world.now, self.world.now - self.ticked > 1
        if now < self.away_until:
            return
        self._age(now - self.ticked)
        self.ticked = now
        if late:
            self.decide()  # before the backlog is read
        self._listen()
        self.decide()
        self._command()

    def _age(self, elapsed_s: float) -> None:
        self.up = self.up.tick(elapsed_s, 1.0)
        for known in self.known.values():
            known.silence = known.silence.tick(elapsed_s, 1.0)
            known.ready = known.ready.tick(elapsed_s, 1.0)
            if known.silence.silence_s >= 5 and known.connected:
                known.connected, known.heard = False, set()
        for name, job in self.jobs.items():
            timers = self.timers.setdefault(name, Timers())
            timers.state = timers.state.tick(elapsed_s, 1.0)
            timers.step = timers.step.tick(elapsed_s, 1.0)
            timers.still = timers.still.tick(elapsed_s, 1.0)
            timers.queued = timers.queued.tick(elapsed_s, 1.0)
            asked = tuple(replace(one, age_s=one.age_s + min(elapsed_s, 1.0)) for one in job.asked)
            wait_s = max(0.0, job.wait_s - elapsed_s)
            failures = tuple(replace(one, age_s=one.age_s + elapsed_s) for one in job.failures)
            self.jobs[name] = replace(job, asked=asked, wait_s=wait_s, failures=failures)

    # ------------------------------------------------------------------ what it hears

    def reaches(self, node: Node) -> bool:
        host = self.world.hosts[node]
        return host.up and self.world.now >= host.cut_until

    def _listen(self) -> None:
        for node, known in self.known.items():
            host = self.world.hosts[node]
            if not host.up:
                if known.connected and known.silence.silence_s >= 1:
                    known.connected, known.heard = False, set()
                if not known.confirmed and self.world.now >= self.confirms.get(node, 10**9):
                    known.confirmed = "confirmed lost"
            elif self.reaches(node):
                self._report(node, known, host)
        for name, job in self.jobs.items():
            if job.attempt is not None:
                self._progress(name, job.attempt)

    def _report(self, node: Node, known: Known, host: Host) -> None:
        if not known.connected:
            known.state, known.ready, known.confirmed = NodeState.READY, Silence(), ""
        known.connected, known.silence = True, Silence()
        for key, part in host.parts.items():
            part.alone_s = 0
            if part.phase is PartPhase.PREPARING and self.world.now >= part.prepared_at:
                part.phase = PartPhase.PREPARED
            ranks = tuple(
                replace(rank, exited_age_s=self.world.now - rank.exited_age_s)
                if rank.exited_age_s is not None
                else rank
                for rank in part.ranks.values()
            )
            known.told[key] = (part.phase, ranks, part.alive if part.phase is not PartPhase.DEAD else 0)
            known.heard.add(key)

    def _progress(self, name: JobId, attempt: AttemptView) -> None:
        timers = self.timers.setdefault(name, Timers())
        gang = self.world.gangs[name, attempt.number]
        seen = any(self.reaches(node) for node in attempt.nodes) and shows_steps(gang.spec)
        if seen and gang.steps_here > 0 and len(gang.path) > timers.seen_step:
            timers.seen_step, timers.step = len(gang.path), Silence()
        dead = sum(
            self._phase(node, (name, attempt.number)) is PartPhase.DEAD or bool(self.known[node].confirmed)
            for node in attempt.nodes
        )
        if dead > timers.dead:
            timers.dead, timers.still = dead, Silence()

    def _phase(self, node: Node, key: Key) -> PartPhase:
        return self.known[node].told.get(key, (PartPhase.UNKNOWN, (), 0))[0]

    # ------------------------------------------------------------------ what it decides

    def view(self) -> View:
        jobs = tuple(self._job(job) for job in self.jobs.values() if job.state not in JOB.final)
        return View(
            jobs=jobs, nodes=tuple(self._node(n, k) for n, k in self.known.items()), up_s=self.up.silence_s
        )

    def _job(self, job: JobView) -> JobView:
        timers = self.timers.setdefault(job.id, Timers())
        queued_s = timers.queued.silence_s if job.state is JobState.QUEUED else 0.0
        if job.attempt is None:
            return replace(job, queued_s=queued_s)
        key = (job.id, job.attempt.number)
        parts = []
        for rank, node in enumerate(job.attempt.nodes):
            known = self.known[node]
            phase, ranks, alive = known.told.get(key, (PartPhase.UNKNOWN, (), 0))
            master = ("host", 1) if rank == 0 and phase is PartPhase.PREPARED else None
            heard = key in known.heard
            parts.append(
                PartView(node=node, phase=phase, heard=heard, alive=alive, ranks=ranks, master=master)
            )
        stepped = job.attempt.stepped or timers.seen_step >= 0
        attempt = replace(
            job.attempt,
            parts=tuple(parts),
            age_s=timers.state.silence_s,
            step=max(timers.seen_step, job.attempt.step),
            step_age_s=timers.step.silence_s,
            still_s=timers.still.silence_s if timers.dead else 0.0,
            stepped=stepped,
        )
        return replace(job, attempt=attempt)

    def _node(self, node: Node, known: Known) -> NodeView:
        present = {(job.id, job.attempt.number) for job in self.jobs.values() if job.attempt is not None}
        lingering = {
            key[0]
            for key, (phase, _, _) in known.told.items()
            if phase is not PartPhase.DEAD and key not in present
        }
        return NodeView(
            name=node,
            pool="local",
            slots=2,
            state=known.state,
            connected=known.connected,
            silence_s=known.silence.silence_s,
            confirmed=known.confirmed,
            ready_s=known.ready.silence_s,
            lingering=frozenset(lingering),
        )

    def decide(self) -> None:
        view = self.view()
        plan = decide(view, self.policy)
        self.witness(self, view, plan)
        for change in plan.changes:
            self.take(change)
        for mark in plan.marks:
            known = self.known[mark.node]
            known.state = NODE.next(known.state, mark.event)
            if mark.event is not NodeEvent.MISS:
                known.ready = Silence()

    def take(self, change: p.JobChange) -> None:
        job = self.jobs[change.job]
        more: dict[str, Any] = {} if isinstance(change, p.Collect) else {"reason": change.reason}
        match change:
            case p.Place():
                more |= self._placed(job, change)
            case p.StandBy():
                assert job.attempt is not None
                more["attempt"] = replace(job.attempt, spares=change.spares)
            case p.Go():
                more |= self._attempt(job, AttemptEvent.GO, went=True, master=change.master)
            case p.Stepped():
                more |= self._attempt(job, AttemptEvent.STEP, stepped=True)
                more["state"] = JOB.next(job.state, JobEvent.STEP)
            case p.End():
                more |= self._ended(job, change)
            case p.Dead():
                more |= self._dead(job, change)
            case p.Complete():
                more |= {"attempt": None, "state": JOB.next(job.state, JobEvent.COMPLETE)}
            case p.Requeue():
                more |= {"state": JOB.next(job.state, JobEvent.REQUEUE), "wait_s": change.wait_s}
                self.timers[job.id].queued = Silence()
            case p.GiveUp():
                more["state"] = JOB.next(job.state, JobEvent.GIVE_UP)
            case p.Rest():
                events = {
                    "suspended": JobEvent.SUSPEND,
                    "cancelled": JobEvent.CANCEL,
                    "queued": JobEvent.RESUME,
                }
                more["state"] = JOB.next(job.state, events[change.to])
            case p.Collect():
                asked = [one for one in job.asked if one.node != change.node]
                more["asked"] = (*asked, Asked(kind="inventory", node=change.node, age_s=0.0))
            case p.Wait():
                pass
        self.jobs[job.id] = replace(job, **more)

    def _placed(self, job: JobView, change: p.Place) -> dict[str, Any]:
        parts = tuple(PartView(node=node) for node in change.nodes)
        path: tuple[Attempt, ...] = ()
        if change.restore is not None:
            path = self.world.stored[job.id][change.restore]
        self.world.gangs[job.id, change.attempt] = Gang(
            job=job.id, attempt=change.attempt, spec=job.spec, nodes=change.nodes, path=list(path)
        )
        self.timers[job.id] = Timers()
        attempt = AttemptView(
            number=change.attempt,
            state=ATTEMPT.first,
            layout=change.layout,
            parts=parts,
            spares=change.spares,
            went=False,
        )
        return {
            "attempt": attempt,
            "attempts": change.attempt,
            "state": JOB.next(job.state, JobEvent.PLACE),
            "lineage": (*job.lineage, change.link),
            "asked": (),
        }

    def _attempt(self, job: JobView, event: AttemptEvent, **more: Any) -> dict[str, Any]:
        assert job.attempt is not None
        timers = self.timers[job.id]
        timers.state = Silence()
        if event is AttemptEvent.GO:
            timers.step = Silence()
        return {"attempt": replace(job.attempt, state=ATTEMPT.next(job.attempt.state, event), **more)}

    def _ended(self, job: JobView, change: p.End) -> dict[str, Any]:
        assert job.attempt is not None
        more = self._attempt(job, AttemptEvent.END)
        events = {
            Wanted.RUN: JobEvent.FAULT,
            Wanted.SUSPEND: JobEvent.SUSPEND,
            Wanted.CANCEL: JobEvent.CANCEL,
        }
        event = JobEvent.FAULT if change.verdict is not None else events[job.wanted]
        more["state"] = JOB.next(job.state, event)
        if change.verdict is not None:
            failure = Failure(
                age_s=0.0,
                blame=change.verdict.blame,
                attempt=change.attempt,
                step=self.timers[job.id].seen_step,
                signature=change.verdict.signature,
                node=change.verdict.node,
            )
            more["failures"] = (*job.failures, failure)
        return more

    def _dead(self, job: JobView, change: p.Dead) -> dict[str, Any]:
        attempt = job.attempt
        assert attempt is not None
        ended = Ended(
            number=attempt.number,
            nodes=attempt.nodes,
            spares=attempt.spares,
            layout=attempt.layout,
            how=change.how,
        )
        more: dict[str, Any] = {"attempt": None, "ended": ended}
        if job.state in (JobState.SUSPENDING, JobState.CANCELLING):
            more["state"] = JOB.next(job.state, JobEvent.DEAD)
        return more

    # ------------------------------------------------------------------ what it commands

    def _command(self) -> None:
        """Levels: what each node that can be reached should run, and what it should stop."""
        for node, known in self.known.items():
            if not known.connected or not self.reaches(node):
                continue
            host = self.world.hosts[node]
            for name, job in self.jobs.items():
                self._serve(host, name, job)
        for name, job in self.jobs.items():
            for one in job.asked:
                if one.age_s >= 1 and self.reaches(one.node):
                    found = tuple(self.world.stored.get(name, {}))
                    inventory = Inventory(after_attempt=Attempt(job.attempts), node=one.node, stored=found)
                    self.jobs[name] = replace(self.jobs[name], inventory=inventory)

    def _serve(self, host: Host, name: JobId, job: JobView) -> None:
        present = job.attempt
        for key in list(host.parts):
            if key[0] == name and (present is None or key[1] != present.number):
                self.world.stop(host, key)
        if present is None or host.name not in present.nodes:
            return
        key = (name, present.number)
        if present.state == "ending":
            self.world.stop(host, key)
        else:
            self.world.prepare(host, self.world.gangs[key], present.nodes.index(host.name))
            if present.went:
                self.world.go(host, key)
