"""Draws the view that decisions are taken from: rows of the book, reports of the fleet, observed ages."""

from dataclasses import replace
from enum import StrEnum
from typing import TypeVar

from keepstep.control.book import Book, Entry, layout_of
from keepstep.control.fleet import Fleet, Heard, Member
from keepstep.control.pace import Paces
from keepstep.core.ids import Attempt, JobId, Node, Rank, Step
from keepstep.core.states import AttemptState, JobState, NodeState
from keepstep.decide.view import (
    AttemptView,
    Gpu,
    JobView,
    Kept,
    NodeView,
    PartPhase,
    PartView,
    RankPhase,
    RankView,
    View,
    Wanted,
)
from keepstep.store.rows import AttemptRow
from keepstep.wire import messages as wire
from keepstep.wire.health import GpuSample

_GPU_AGE_MAX_S = 10.0  # an older sample says nothing of now
ASKED_WITHIN_S = 5.0  # for a spare to say what it holds, once the gang is dead


def draw(book: Book, fleet: Fleet, *, wall: float, up_s: float) -> View:
    return View(
        jobs=tuple(draw_job(entry, fleet, wall) for entry in book.entries.values()),
        nodes=tuple(_node(member, book, fleet) for member in fleet.members.values() if _counts(member)),
        up_s=up_s,
    )


def draw_job(entry: Entry, fleet: Fleet, wall: float) -> JobView:
    job, row = entry.job, entry.present
    incident = entry.open_incident
    return JobView(
        id=job.id,
        spec=entry.spec,
        state=JobState(job.state),
        wanted=Wanted(job.wanted),
        reason=job.reason,
        number=job.number,
        attempt=None if row is None else _attempt(entry, row, fleet),
        attempts=entry.attempts[-1].number if entry.attempts else 0,
        lineage=entry.lineage(),
        steps_done=entry.steps_done,
        failures=entry.failures(wall),
        wait_s=max(0.0, (job.not_before or 0.0) - wall),
        queued_s=fleet.time.age(entry.queued_at),
        inventory=entry.inventory,
        asked=entry.asking(fleet.time),
        attached=job.attached_node,
        incident=incident.id if incident else None,
        kept=_settled(entry, fleet) if row is None or row.state == AttemptState.ENDING else (),
        saving=entry.saved(fleet.time),
        checkpoint_step=entry.progress.checkpoint_step,
        ended=entry.ended(),
        usual=entry.usual,
        examined=entry.closely(fleet.time),
        examining=entry.examining,
        measured=entry.measured(),
        found={what: fleet.time.age(at) for what, at in entry.found.items()},
        lacks=entry.lacks,
        losses=tuple(entry.progress.losses),
    )


def _settled(entry: Entry, fleet: Fleet) -> tuple[Kept, ...]:
    """When a gang ends: its own nodes look before they report their end, spares are asked when it is dead."""
    if not entry.attempts:
        return ()
    row, found = entry.attempts[-1], kept(entry.job.id, fleet)
    asked = {
        member.name
        for member in fleet.members.values()
        for status in member.snapshots
        if status.job == entry.job.id and status.after >= row.number
    }
    known = {*row.nodes, *asked}
    waits = entry.present is None and fleet.time.age(entry.progress.state_since) < ASKED_WITHIN_S
    return tuple(
        one if one.node in known else replace(one, fresh=False) for one in found if waits or one.node in known
    )


def kept(job: JobId, fleet: Fleet) -> tuple[Kept, ...]:
    """What nodes that answer hold of a job in memory."""
    return tuple(
        Kept(
            rank=Rank(held.rank), world=held.world, attempt=Attempt(held.attempt), step=Step(held.step),
            node=member.name, own=held.own,
        )
        for member in fleet.members.values()
        if member.talks(fleet.time)
        for status in member.snapshots
        if status.job == job
        for held in status.held
    )  # fmt: skip


def _attempt(entry: Entry, row: AttemptRow, fleet: Fleet) -> AttemptView:
    progress = entry.progress
    return AttemptView(
        number=row.number,
        state=AttemptState(row.state),
        layout=layout_of(row),
        parts=tuple(_part(node, row, fleet, progress.paces) for node in row.nodes),
        spares=tuple(row.spares),
        age_s=fleet.time.age(progress.state_since),
        step=progress.step,
        step_age_s=fleet.time.age(progress.moved_at),
        stepped=progress.stepped,
        went=row.master is not None,
        still_s=_still_s(row, fleet),
        progress_age_s=None if progress.counted_at is None else fleet.time.age(progress.counted_at),
        step_every_s=max(progress.step_every, default=0.0),
        checkpoint_step=progress.checkpoint_step,
        snapshot_step=progress.snapshot_step,
        master=(row.master["address"], row.master["port"]) if row.master else None,
    )


def _part(node: Node, row: AttemptRow, fleet: Fleet, paces: Paces) -> PartView:
    member = fleet.members.get(node)
    heard = member.attempts.get((row.job, row.number)) if member else None
    if member is None or heard is None:
        return PartView(node=node)
    status = heard.status
    gpus = {sample.uuid: sample for sample in member.health.gpus} if member.health else {}
    return PartView(
        node=node,
        phase=_known(PartPhase, status.phase, PartPhase.UNKNOWN),
        heard=member.talks(fleet.time) and (row.job, row.number) in member.current,
        reason=status.reason,
        alive=status.alive,
        master=status.master,
        ranks=tuple(_rank(rank, heard, fleet, paces, gpus.get(rank.gpu)) for rank in status.ranks),
    )


def _rank(
    status: wire.RankStatus, heard: Heard, fleet: Fleet, paces: Paces, gpu: GpuSample | None
) -> RankView:
    since = fleet.time.age(heard.at)
    return RankView(
        rank=Rank(status.rank),
        phase=_known(RankPhase, status.state, RankPhase.UNKNOWN),
        exit_code=status.exit_code,
        signal=status.signal,
        exited_age_s=None if status.exited_age_s is None else status.exited_age_s + since,
        exit_order=status.exit_order,
        step=status.step,
        doing=status.phase,
        doing_age_s=None if status.phase_age_s is None else status.phase_age_s + since,
        error=status.error,
        local_rank=status.local_rank,
        process=status.process,
        process_s=status.process_s,
        still_s=status.still_s,
        micro_batch=status.micro_batch,
        counter=status.counter,
        waiting_s=None if status.waiting_s is None else status.waiting_s + since,
        group=status.group,
        group_sequence=status.group_sequence,
        peer=status.peer,
        launched=status.launched,
        completed=status.completed,
        batches=status.batches,
        wait_s=status.wait_s,
        pace=paces.of(status.rank),
        gpu=None if gpu is None or gpu.age_s > _GPU_AGE_MAX_S else _gpu(gpu),
        trouble=status.trouble,
        trouble_step=status.trouble_step,
    )


def _gpu(sample: GpuSample) -> Gpu:
    return Gpu(
        index=sample.index,
        throttled=sample.throttled,
        clock_mhz=sample.sm_clock_mhz,
        lanes=sample.pcie_width,
        generation=sample.pcie_generation,
    )


def _still_s(row: AttemptRow, fleet: Fleet) -> float:
    """Since the newest moment at which a part of the attempt was heard dead, or its node was confirmed so."""
    moments = []
    for node in row.nodes:
        member = fleet.members.get(node)
        heard = member.attempts.get((row.job, row.number)) if member else None
        if heard is not None and heard.dead_at is not None:
            moments.append(heard.dead_at)
        elif member is not None and member.confirmed:
            moments.append(member.confirmed_at)
    return fleet.time.age(max(moments)) if moments else 0.0


def _lingering(member: Member, book: Book) -> frozenset[JobId]:
    """Jobs of which an attempt that is not the present one still lives on this node."""
    found = set()
    for job, number in member.current:
        entry = book.entries.get(JobId(job))
        present = entry.present.number if entry and entry.present else 0
        if number != present and member.attempts[job, number].status.phase not in {"dead", "refused"}:
            found.add(JobId(job))
    return frozenset(found)


def _node(member: Member, book: Book, fleet: Fleet) -> NodeView:
    connected = member.talks(fleet.time)
    return NodeView(
        name=member.name,
        pool=member.pool,
        slots=member.slots,
        state=member.state,
        connected=connected,
        silence_s=fleet.time.age(max(member.heard_at, member.acknowledged_at)),
        confirmed=member.confirmed,
        reset=member.reset,
        leaving=member.session is not None and member.leaving and not _alive(member),
        left=member.session is None and member.leaving and not _alive(member),
        life=member.life,
        life_why=member.life_why,
        life_by=member.life_by,
        drain_s=member.drain_s,
        attached=next((e.job.id for e in book.entries.values() if e.job.attached_node == member.name), None),
        warm_for=frozenset(JobId(s.job) for s in member.standbys if s.state == "ready"),
        ready_s=fleet.time.age(member.ready_at) if connected else 0.0,
        lingering=_lingering(member, book),
        labels=member.labels,
    )


def _alive(member: Member) -> bool:
    return any(heard.status.phase not in {"dead", "refused"} for heard in member.attempts.values())


def _counts(member: Member) -> bool:
    return member.state is not NodeState.GONE or bool(member.attempts)


T = TypeVar("T", bound=StrEnum)


def _known(kind: type[T], word: str, otherwise: T) -> T:
    """A word of the wire; a newer agent's new word is unknown, not an error."""
    try:
        return kind(word)
    except ValueError:
        return otherwise
