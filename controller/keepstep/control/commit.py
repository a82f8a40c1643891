"""Writes a plan into the store: the decision and everything that follows from it, in one transaction.

Every state goes through its table, so a plan that does not fit the state it was made for raises instead of
being bent to fit. What is written here is the desired state; agents are reconciled towards it afterwards.
"""

from dataclasses import asdict, dataclass
from typing import Any, assert_never

from keepstep.control.book import Entry
from keepstep.core.ids import JobId
from keepstep.core.states import (
    ATTEMPT,
    INCIDENT,
    JOB,
    NODE,
    AttemptEvent,
    AttemptState,
    IncidentEvent,
    IncidentState,
    JobEvent,
    JobState,
    NodeState,
)
from keepstep.decide import plan as p
from keepstep.decide.view import JobView
from keepstep.store import Writer
from keepstep.store.rows import Incident, NewEvent

REQUEUE = "requeue"  # the reason of a suspension that ends by itself


@dataclass(slots=True)
class _Pen:
    """One job's rows within one transaction."""

    writer: Writer
    entry: Entry
    view: JobView
    change: p.JobChange

    @property
    def job(self) -> JobId:
        return self.entry.job.id

    def move(self, event: JobEvent, **more: Any) -> None:
        """The job's state by its table; a final state also ends it."""
        state = JOB.next(JobState(self.writer.job(self.job).state), event)
        if state in JOB.final:
            more["finished_at"] = self.writer.now
        self.writer.update_job(self.job, state=state, reason=self.change.reason, **more)

    def attempt(self, event: AttemptEvent, **more: Any) -> None:
        row = self.writer.attempts(self.job)[-1]
        state = ATTEMPT.next(AttemptState(row.state), event)
        if state is AttemptState.ENDED:
            more["ended_at"] = self.writer.now
        self.writer.update_attempt(self.job, row.number, state=state, **more)

    def incident(self, event: IncidentEvent, **more: Any) -> int | None:
        """The open incident's state; nothing if there is none or it has no use for the event."""
        row = self.entry.open_incident
        if row is None:
            return None
        current = IncidentState(self.writer.incident(row.id).state)
        if INCIDENT.allows(current, event):
            self.writer.update_incident(row.id, state=INCIDENT.next(current, event), **more)
        return row.id

    def decide(self, kind: str) -> int:
        decision = self.writer.add_decision(
            job=self.job,
            kind=kind,
            reason=self.change.reason,
            rejected=[asdict(option) for option in self.change.rejected],
            plan=asdict(self.change),
            slice=asdict(self.view),
        )
        return decision.id

    def tell(self, kind: str, *, incident: int | None = None, text: str = "", **data: Any) -> None:
        """Into the timeline, with the change's reason where there is no `text`."""
        attempt = getattr(self.change, "attempt", None)
        self.writer.add_event(
            NewEvent(
                kind=kind,
                text=text or self.change.reason,
                job=self.job,
                attempt=attempt,
                incident=incident,
                data=data,
            )
        )


def commit(writer: Writer, entry: Entry, view: JobView, change: p.JobChange) -> None:
    """One change of one job. Errors: UnknownTransition where the plan does not fit the state (a bug)."""
    pen = _Pen(writer, entry, view, change)
    match change:
        case p.Place():
            _place(pen, change)
        case p.StandBy():
            writer.update_attempt(entry.job.id, change.attempt, spares=list(change.spares))
            pen.tell("spares", spares=change.spares)
        case p.Go():
            master = {"address": change.master[0], "port": change.master[1]}
            pen.attempt(AttemptEvent.GO, master=master)
            pen.tell("went", master=master)
        case p.Stepped():
            _stepped(pen, change)
        case p.End():
            _end(pen, change)
        case p.Find():
            pen.tell("found", verdict=asdict(change.verdict))
        case p.Dead():
            _dead(pen, change)
        case p.Complete():
            _sums(pen)
            pen.attempt(AttemptEvent.COMPLETE, outcome="succeeded")
            pen.move(JobEvent.COMPLETE, exit_code=0)
            pen.incident(IncidentEvent.CLOSE, closed_at=writer.now)
            pen.tell("succeeded")
        case p.Requeue() | p.GiveUp():
            _let_go(pen, change)
        case p.Rest():
            _rest(pen, change)
        case p.Wait():
            if change.reason != entry.job.reason:
                writer.update_job(entry.job.id, reason=change.reason)
                pen.tell("waiting")
        case p.Collect() | p.Examine() | p.Save():
            pass  # a question to an agent, nothing to remember
        case _:
            assert_never(change)


def _stepped(pen: _Pen, change: p.Stepped) -> None:
    now = pen.writer.now
    pen.attempt(AttemptEvent.STEP, first_step_at=now)
    pen.move(JobEvent.STEP, started_at=pen.entry.job.started_at or now)
    pen.tell("stepped", incident=pen.incident(IncidentEvent.STEP, recovered_at=now), step=change.step)


def _dead(pen: _Pen, change: p.Dead) -> None:
    pen.attempt(AttemptEvent.DEAD, outcome=change.how)
    open_incident = pen.entry.open_incident
    pen.tell("dead", incident=open_incident.id if open_incident else None, how=change.how)
    job = pen.entry.job
    if job.state in {JobState.SUSPENDING, JobState.CANCELLING}:
        pen.move(JobEvent.DEAD)
        pen.incident(IncidentEvent.CLOSE, closed_at=pen.writer.now)
        pen.tell("suspended" if job.state == JobState.SUSPENDING else "cancelled")
        if job.wanted_reason == REQUEUE:
            pen.writer.update_job(pen.job, wanted="run", wanted_reason="")


def _sums(pen: _Pen) -> None:
    """What the attempt lost to checkpoints, and what its time went into: told once, when it is over."""
    if by_phase := pen.entry.progress.shares():
        parts = ", ".join(f"{part} {share:.0%}" for part, share in by_phase.items() if share)
        pen.tell("spent", text=f"time in steps: {parts}", by_phase=by_phase)
    stall_s = pen.entry.progress.stall_s
    if stall_s > 0:
        pen.tell("stall", seconds=stall_s)


def _let_go(pen: _Pen, change: p.Requeue | p.GiveUp) -> None:
    now = pen.writer.now
    if isinstance(change, p.Requeue):
        decision = pen.decide("requeue")
        pen.move(JobEvent.REQUEUE, not_before=now + change.wait_s)
        incident = pen.incident(IncidentEvent.WAIT, decision=decision, decided_at=now)
        pen.tell("requeued", incident=incident, wait_s=change.wait_s)
    else:
        decision = pen.decide("give up")
        pen.move(JobEvent.GIVE_UP, exit_code=change.exit_code)
        incident = pen.incident(IncidentEvent.CLOSE, decision=decision, closed_at=now)
        pen.tell("failed", incident=incident)


def _place(pen: _Pen, change: p.Place) -> None:
    decision = pen.decide("place")
    layout, link = change.layout, change.link
    pen.writer.add_attempt(
        job=pen.job,
        number=change.attempt,
        nodes=change.nodes,
        spares=change.spares,
        layout={"dp": layout.dp, "pp": layout.pp, "cp": layout.cp, "tp": layout.tp},
        state=AttemptState.PREPARING,
        rung=change.rung,
        reason=change.reason,
        parent=(link.parent, link.parent_step) if link.parent else None,
        restore=_restore(change),
    )
    pen.move(JobEvent.PLACE, not_before=None)
    incident = pen.incident(IncidentEvent.DECIDE, decision=decision, decided_at=pen.writer.now)
    pen.tell(
        "placed",
        incident=incident,
        rung=change.rung,
        nodes=change.nodes,
        spares=change.spares,
        slots=layout.world_size,
        step=link.parent_step,
    )


def _restore(change: p.Place) -> dict[str, Any] | None:
    if change.restore is None:
        return None
    where = {"memory": asdict(change.memory)} if change.memory else {}
    return {**asdict(change.restore), **where}


def _end(pen: _Pen, change: p.End) -> None:
    verdict = change.verdict
    incident = None
    if verdict is not None:
        incident = pen.incident(IncidentEvent.WORSEN)
        row = _incident(pen, change, verdict)
        if incident is not None:
            pen.writer.update_incident(incident, state=IncidentState.CLOSED, closed_at=pen.writer.now)
        incident = row.id
    pen.decide("end")
    _sums(pen)
    pen.attempt(AttemptEvent.END, reason=change.reason, incident=incident)
    wanted = pen.entry.job.wanted
    if verdict is None and wanted != "run":
        pen.move(JobEvent.CANCEL if wanted == "cancel" else JobEvent.SUSPEND)
    else:
        pen.move(JobEvent.FAULT)
    pen.tell(
        "detected" if verdict else "stopping",
        incident=incident,
        began_s=verdict.began_s if verdict else 0.0,
        verdict=verdict.kind if verdict else "",
    )


def _incident(pen: _Pen, change: p.End, verdict: p.Verdict) -> Incident:
    evidence = {
        "what": verdict.what,
        "blame": verdict.blame,
        "signature": verdict.signature,
        "step": verdict.step
        if verdict.step is not None
        else pen.view.attempt.step
        if pen.view.attempt
        else -1,
        "not_after": verdict.not_after,
        "began_s": verdict.began_s,
        "noticed": verdict.noticed,
        "bound_s": verdict.bound_s,
        "confidence": verdict.confidence,
        "slowdown": verdict.slowdown,
        "lines": verdict.evidence,
        "exit_code": verdict.exit_code,
        "error": verdict.error,
    }
    coordinates = ""
    if verdict.rank is not None and pen.view.attempt is not None:
        coordinates = str(pen.view.attempt.layout.coordinates(verdict.rank))
    culprit = {"rank": verdict.rank, "node": verdict.node, "role": coordinates}
    return pen.writer.add_incident(
        job=pen.job,
        attempt=change.attempt,
        verdict=verdict.kind,
        culprit=culprit,
        evidence=evidence,
        opened_at=pen.writer.now,
    )


def _rest(pen: _Pen, change: p.Rest) -> None:
    """A job without a living attempt becomes what its owner wants."""
    state = JobState(pen.entry.job.state)
    steps = {"suspended": JobEvent.SUSPEND, "cancelled": JobEvent.CANCEL, "queued": JobEvent.RESUME}
    pen.move(steps[change.to])
    if state is JobState.RECOVERING:
        pen.move(JobEvent.DEAD)
    if change.to != "queued":
        pen.incident(IncidentEvent.CLOSE, closed_at=pen.writer.now)
    pen.tell({"queued": "resumed"}.get(change.to, change.to))


def mark(writer: Writer, change: p.MarkNode, state: NodeState) -> NodeState:
    after = NODE.next(state, change.event)
    writer.upsert_node(change.node, state=after, state_reason=change.reason)
    writer.add_event(NewEvent(kind=f"node {after}", text=change.reason, node=change.node))
    return after
