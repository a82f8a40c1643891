"""decide(view, policy) -> plan: one look at everything, at most one change for each job.

Each job is answered by its state; what the states share are the nodes. Attempts hold theirs until they are
dead, jobs that recover hold those they just ran on, and what is left goes to waiting jobs by priority and
then age, and last to jobs that would grow. The same view gives the same plan; a change that was taken shows
in the next view, so that it is not decided again.
"""

from dataclasses import dataclass, field
from typing import assert_never

from keepstep.core.ids import JobId, Node, Step
from keepstep.core.states import AttemptState, JobState, NodeEvent, NodeState
from keepstep.decide.budget import worn_out
from keepstep.decide.death import death, fenced, orphan_lease_s
from keepstep.decide.hung import STANDS, Suspicion
from keepstep.decide.judge import judge
from keepstep.decide.leave import leave
from keepstep.decide.lying import jump
from keepstep.decide.place import could_ever, layouts, listed, missing, place, stand_by, survey
from keepstep.decide.plan import (
    Complete,
    Dead,
    End,
    Examine,
    Find,
    GiveUp,
    Go,
    JobChange,
    MarkNode,
    Pending,
    Place,
    Plan,
    Policy,
    Requeue,
    Rest,
    StandBy,
    Stepped,
    Wait,
)
from keepstep.decide.recover import begin, grow, recover
from keepstep.decide.save import saved_first
from keepstep.decide.slow import slow, worth_a_swap
from keepstep.decide.view import AttemptView, JobView, NodeView, PartPhase, RankPhase, View, Wanted

FOUND_MAX = 8  # of an attempt: more is noise
FINISH_S = 10.0  # for a script that is just writing a file whose late end would be torn


def decide(view: View, policy: Policy) -> Plan:
    """What should change now, by job in the order in which nodes are given out; and marks of nodes."""
    return _Deciding(view=view, policy=policy).plan()


@dataclass(slots=True, kw_only=True)
class _Deciding:
    """One decision under way: the nodes that are given out as it goes along."""

    view: View
    policy: Policy
    nodes: dict[Node, NodeView] = field(init=False)
    jobs: dict[JobId, JobView] = field(init=False)
    held: dict[Node, JobId] = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = {node.name: node for node in self.view.nodes}
        self.jobs = {job.id: job for job in self.view.jobs}
        self.held = {}
        for job in self.view.jobs:
            if job.attempt is not None:
                self.held.update(dict.fromkeys((*job.attempt.nodes, *job.attempt.spares), job.id))
        for job in self.view.jobs:
            if job.attempt is None and job.state is JobState.RECOVERING and job.ended is not None:
                for name in (*job.ended.nodes, *job.ended.spares):
                    self.held.setdefault(name, job.id)

    @property
    def returned(self) -> bool:
        return self.view.up_s >= self.policy.return_within_s

    def plan(self) -> Plan:
        served = sorted(self.view.jobs, key=lambda job: (-job.spec.priority, job.number, job.id))
        # Jobs that are under way come before jobs that wait: what they lose must not be given away first.
        served.sort(key=lambda job: job.state is JobState.QUEUED)
        changes: list[JobChange] = []
        leaving = [node.name for node in self.view.nodes if node.leaving]
        for job in served:
            change = saved_first(job, self._job(job), self.policy, leaving)
            if change is not None:
                changes.append(change)
            if isinstance(change, Place):
                self.held.update(dict.fromkeys((*change.nodes, *change.spares), job.id))
        changed = {change.job for change in changes}
        growing = (self._grown(job) for job in served if job.id not in changed)
        changes += [change for change in growing if change is not None]
        changed = {change.job for change in changes}
        standing = (self._stood_by(job) for job in served if job.id not in changed)
        changes += [change for change in standing if change is not None]
        return Plan(changes=tuple(changes), marks=marks(self.view, self.policy))

    def _job(self, job: JobView) -> JobChange | None:
        match job.state:
            case JobState.QUEUED:
                return self._queued(job)
            case JobState.SUSPENDED:
                return _rest(job)
            case JobState.STARTING | JobState.RUNNING | JobState.RECOVERING:
                if job.attempt is None:
                    return self._between(job)
                return self._attempt(job, job.attempt)
            case JobState.SUSPENDING | JobState.CANCELLING:
                return None if job.attempt is None else self._attempt(job, job.attempt)
            case JobState.SUCCEEDED | JobState.FAILED | JobState.CANCELLED:
                return None
            case _ as never:
                assert_never(never)

    def _queued(self, job: JobView) -> JobChange:
        if job.wanted is not Wanted.RUN:
            return Rest(job=job.id, reason=f"its owner wants it {_asked(job)}", to=_asked(job))
        gone = self._terminal_gone(job)
        if gone is not None:
            return gone
        if job.wait_s > 0:
            return Wait(job=job.id, reason=job.reason or "waits for its back-off", due_s=job.wait_s)
        first = (*job.ended.nodes, *job.ended.spares) if job.ended is not None else ()
        there = survey(job, self.view.nodes, self.held, first, worn_out(job, self.policy))
        # Right after a controller's start nodes are still coming back: no reason to start with fewer.
        smaller = job.attempts > 0 and self.returned
        options = layouts(job.spec) if smaller else layouts(job.spec)[:1]
        for layout in options:
            placement = place(job, there, layout)
            if placement is not None:
                rung = "requeued" if job.attempts else "first"
                return begin(job, self.view, self.held, self.policy, placement, rung)
        lacking = missing(job, there, self.held, self.jobs, smaller=smaller)
        self._hold_for(job)
        due_s = max(self.policy.hold_after_s - job.queued_s, self.policy.collect_within_s)
        return Wait(job=job.id, reason=lacking.reason, rejected=lacking.rejected, due_s=due_s)

    def _hold_for(self, job: JobView) -> None:
        """Nodes that come free are kept for a job that has waited for long, if it can ever run here."""
        if job.queued_s >= self.policy.hold_after_s:
            for name in could_ever(job, self.view.nodes):
                self.held.setdefault(name, job.id)

    def _terminal_gone(self, job: JobView) -> GiveUp | None:
        """An attached job lives as long as the terminal that it was started from."""
        if job.attached is None:
            return None
        node = self.nodes.get(job.attached)
        lost = node is not None and (node.confirmed or node.state in (NodeState.LOST, NodeState.GONE))
        away_s = job.queued_s if node is None else 0.0 if node.connected else node.silence_s
        if not lost and away_s < self.policy.prepare_within_s:
            return None
        why = "is gone" if lost else f"did not come within {self.policy.prepare_within_s:g} s"
        return GiveUp(job=job.id, reason=f"its terminal's agent {job.attached} {why}")

    def _between(self, job: JobView) -> JobChange:
        """No attempt is left: the ladder, unless its owner wants it to rest."""
        if job.wanted is not Wanted.RUN:
            return Requeue(job=job.id, reason=f"its owner wants it {_asked(job)}", wait_s=0.0)
        return self._terminal_gone(job) or recover(job, self.view, self.held, self.jobs, self.policy)

    def _attempt(self, job: JobView, attempt: AttemptView) -> JobChange | None:
        if attempt.state is AttemptState.ENDING:
            return self._ending(job, attempt)
        if _complete(attempt, self.nodes):
            ranks = attempt.layout.world_size
            return Complete(job=job.id, attempt=attempt.number, reason=f"all {ranks} ranks exited 0")
        if job.wanted is not Wanted.RUN:
            grace_s = job.spec.run.stop.grace_s
            reason = f"its owner wants it {_asked(job)}; its ranks have {grace_s:g} s to end by themselves"
            return End(job=job.id, attempt=attempt.number, grace_s=grace_s, reason=reason)
        verdict = judge(job, attempt, self.nodes, self.policy, self.returned)
        if isinstance(verdict, Pending):
            return Wait(job=job.id, reason=verdict.reason, due_s=verdict.due_s)
        if isinstance(verdict, Suspicion):
            within_s, number = self.policy.examine_within_s, attempt.number
            return Examine(
                job=job.id, attempt=number, reason=verdict.reason, nodes=verdict.nodes, within_s=within_s
            )
        if verdict is not None:
            finish_s = 0.0 if fenced(job.spec) else FINISH_S
            reason = (
                f"{verdict.what}; to blame: {'the job' if verdict.blame == 'job' else 'the infrastructure'}"
            )
            return End(job=job.id, attempt=attempt.number, verdict=verdict, finish_s=finish_s, reason=reason)
        left = leave(job, attempt, self.view, self.held, self.policy)
        if left is not None:
            return left
        match attempt.state:
            case AttemptState.PREPARING:
                return self._preparing(job, attempt)
            case AttemptState.STARTING if attempt.stepped:
                reason = f"attempt {attempt.number} completed step {attempt.step}"
                return Stepped(job=job.id, attempt=attempt.number, step=Step(attempt.step), reason=reason)
            case AttemptState.RUNNING if (found := self._found(job, attempt)) is not None:
                return found
            case _ if job.reason.startswith(STANDS):
                reason = f"attempt {attempt.number} goes on: its ranks move again"
                return Wait(job=job.id, reason=reason, due_s=self.policy.say_still_s)
            case _:
                return self._unanswered(job, attempt)

    def _found(self, job: JobView, attempt: AttemptView) -> End | Find | None:
        """What is no failure: a gang that is held up, a loss that jumps. Told once.

        A node that has held the gang up for long is swapped if that pays.
        """
        verdict = slow(job, attempt) or jump(job)
        if verdict is None:
            return None
        since_s = job.found.get(verdict.signature)
        long = since_s is not None and since_s >= self.policy.slow_after_s
        if long and worth_a_swap(job, attempt, verdict, self.policy):
            reason = f"{verdict.what}; a spare takes its place"
            return End(job=job.id, attempt=attempt.number, verdict=verdict, reason=reason)
        if since_s is not None or len(job.found) >= FOUND_MAX:
            return None
        return Find(job=job.id, attempt=attempt.number, verdict=verdict, reason=verdict.what)

    def _preparing(self, job: JobView, attempt: AttemptView) -> Go | Wait:
        bound_s = min(job.spec.recovery.start_within_s, self.policy.prepare_within_s)
        late = [part.node for part in attempt.parts if part.phase is not PartPhase.PREPARED or not part.heard]
        late += [part.node for part in attempt.parts if not late and not self._ready(part.node)]
        master = attempt.parts[0].master
        if late or master is None:
            reason = (
                f"prepares {listed(late)}"
                if late
                else f"{attempt.parts[0].node} does not say where ranks meet"
            )
            reason += f", for {bound_s:g} s at most"
            return Wait(job=job.id, reason=reason, due_s=max(bound_s - attempt.age_s, 0.0))
        if job.ended is not None and job.ended.how == "lease" and fenced(job.spec):
            # Its predecessor's agents renewed their lease while no newer attempt had raised the fence.
            lease_s = orphan_lease_s(job.spec, self.policy) + self.policy.fence_margin_s
            if attempt.age_s < lease_s:
                former = f"attempt {job.ended.number} may have trained until the fence was raised"
                reason = f"{former}: waits {lease_s:g} s for its agents' leases"
                return Wait(job=job.id, reason=reason, due_s=lease_s - attempt.age_s)
        parts = len(attempt.parts)
        reason = f"all {parts} nodes are prepared" if parts > 1 else f"{attempt.parts[0].node} is prepared"
        reason += f"; ranks meet at {master[0]}:{master[1]}"
        return Go(job=job.id, attempt=attempt.number, master=master, reason=reason)

    def _ready(self, name: Node) -> bool:
        node = self.nodes.get(name)
        return node is not None and node.connected and not node.confirmed

    def _unanswered(self, job: JobView, attempt: AttemptView) -> Wait | None:
        """Nothing is wrong with a gang that nobody can ask, but it should be said."""
        if any(self._ready(part.node) for part in attempt.parts):
            return None
        lease_s = orphan_lease_s(job.spec, self.policy)
        reason = (
            f"no node of attempt {attempt.number} answers; it probably goes on. Left alone for {lease_s:g} s"
        )
        return Wait(job=job.id, reason=reason, due_s=lease_s)

    def _ending(self, job: JobView, attempt: AttemptView) -> JobChange:
        run = job.spec.run
        done = run.kind == "llama" and attempt.step >= run.steps and _complete(attempt, self.nodes)
        if done and job.state is JobState.SUSPENDING:
            return Complete(
                job=job.id, attempt=attempt.number, reason=f"it had completed its {attempt.step} steps"
            )
        end = death(attempt, job.spec, self.nodes, self.policy, returned=self.returned)
        if end.how:
            return Dead(job=job.id, attempt=attempt.number, how=end.how, reason=end.reason)
        return Wait(job=job.id, reason=end.reason, due_s=end.due_s)

    def _grown(self, job: JobView) -> End | None:
        attempt = job.attempt
        if job.state is not JobState.RUNNING or attempt is None or attempt.state is not AttemptState.RUNNING:
            return None
        return grow(job, attempt, self.view, self.held, self.policy)

    def _stood_by(self, job: JobView) -> StandBy | None:
        """After everybody who waits for nodes had their turn: spares that came, or went."""
        attempt = job.attempt
        if attempt is None or attempt.state is AttemptState.ENDING:
            return None
        there = survey(job, self.view.nodes, self.held, attempt.spares, worn_out(job, self.policy))
        spares = stand_by(job, attempt, there)
        if set(spares) == set(attempt.spares):
            return None
        self.held.update(dict.fromkeys(spares, job.id))
        wanted = job.spec.resources.spares
        gone = [name for name in attempt.spares if name not in spares]
        reason = f"{len(spares)} of {wanted} spares standing by: {listed(spares) or 'none'}"
        reason += f"; {listed(gone)} cannot be used any more" if gone else ""
        return StandBy(job=job.id, attempt=attempt.number, spares=spares, reason=reason)


def marks(view: View, policy: Policy) -> tuple[MarkNode, ...]:
    """What the fleet should think of its nodes. Silence is a mark, not a death."""
    just_started = view.up_s < policy.return_within_s
    found = ((node.name, _mark(node, policy, just_started)) for node in view.nodes)
    return tuple(
        MarkNode(node=name, event=mark[0], reason=mark[1]) for name, mark in found if mark is not None
    )


def _mark(node: NodeView, policy: Policy, just_started: bool) -> tuple[NodeEvent, str] | None:
    if node.confirmed and node.state in (NodeState.READY, NodeState.SILENT):
        return NodeEvent.CONFIRM, node.confirmed
    if node.left and node.state in (NodeState.READY, NodeState.SILENT):
        return NodeEvent.LEAVE, "its agent took its leave"
    if node.state is NodeState.READY and node.silence_s >= policy.silent_after_s and not just_started:
        return NodeEvent.MISS, f"no word for {policy.silent_after_s:g} s"
    if node.state is NodeState.SILENT and node.connected and node.silence_s < policy.silent_after_s:
        return NodeEvent.HEAR, "it talks again"
    return None


def _complete(attempt: AttemptView, nodes: dict[Node, NodeView]) -> bool:
    """Every rank exited 0, and wherever one can ask nothing else of it is left."""
    ranks = [rank for part in attempt.parts for rank in part.ranks]
    if len(ranks) < attempt.layout.world_size:
        return False
    if any(rank.phase is not RankPhase.EXITED or rank.exit_code != 0 for rank in ranks):
        return False
    return all(part.phase is PartPhase.DEAD or part.alive == 0 or not part.heard for part in attempt.parts)


def _rest(job: JobView) -> Rest | None:
    if job.wanted is Wanted.SUSPEND:
        return None
    to = "queued" if job.wanted is Wanted.RUN else "cancelled"
    return Rest(job=job.id, reason=f"its owner wants it {'to run' if to == 'queued' else to}", to=to)


def _asked(job: JobView) -> str:
    return "cancelled" if job.wanted is Wanted.CANCEL else "suspended"
