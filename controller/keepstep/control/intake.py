"""What agents say, taken in: state into the fleet and the progress of attempts, events into the store.

State may wake the next decision; events are history, and are acknowledged only when they are stored.
"""

import math
from collections.abc import Iterable
from typing import Any

from keepstep.control.book import Book, Entry
from keepstep.control.fleet import Fleet, Member
from keepstep.core.errors import KeepstepError
from keepstep.core.ids import Attempt, JobId, Step
from keepstep.store import Writer
from keepstep.store.rows import CurvePoint, Evaluation, NewEvent
from keepstep.wire import messages as wire

_SHOWN = {
    "rank_started",
    "rank_exited",
    "self_fenced",
    "standby_ready",
    "standby_broken",
    "snapshots_off",
    "cold",
    "gap",
    "orphans",
}
_TEXT_MAX = 500
_LEARN_EVERY_S = 1.0


def resume(book: Book, fleet: Fleet, member: Member) -> None:
    """Nobody could see a gang's steps while none of its nodes talked: its stillness counts from now."""
    for job, number in member.current:
        entry = book.entries.get(JobId(job))
        if entry is None or entry.progress.attempt != number:
            continue
        others = [other for other, _, current in fleet.parts(job, number) if current and other is not member]
        if not any(other.talks(fleet.time) for other in others):
            entry.progress.moved_at = entry.progress.counted_at = fleet.time.now


def follow(book: Book, fleet: Fleet, member: Member) -> bool:
    """Move the progress of attempts on with what one node has just reported. True at a first step."""
    woken = False
    for job, number in member.current:
        entry = book.entries.get(JobId(job))
        if entry is None or entry.progress.attempt != number:
            continue
        status = member.attempts[job, number].status
        if status.phases:
            entry.progress.bubbles[member.name] = status.bubble_s
            _learn(entry, fleet, member, status.phases)
        newest = entry.progress.losses[-1][0] if entry.progress.losses else -1
        entry.progress.losses.extend((step, loss) for step, loss in status.losses if step > newest)
        for rank in status.ranks:
            entry.progress.paces.hear(rank)
        woken = _follow(entry, fleet, status.ranks) or woken
    return woken


def _learn(entry: Entry, fleet: Fleet, member: Member, phases: tuple[wire.PhaseSeen, ...]) -> None:
    """Durations of phases, added up anew once in a while: they change slowly."""
    progress = entry.progress
    progress.phases[member.name] = phases
    if progress.learnt_at < 0 or fleet.time.age(progress.learnt_at) >= _LEARN_EVERY_S:
        progress.learnt_at = fleet.time.now
        entry.learn()


def _follow(entry: Entry, fleet: Fleet, ranks: Iterable[wire.RankStatus]) -> bool:
    progress = entry.progress
    moved = False
    for rank in ranks:
        before = progress.by_rank.get(rank.rank, (-1, 0))
        moved = moved or rank.step > before[0]
        if (rank.step, rank.counter) != before:
            progress.counted_at = fleet.time.now
        progress.by_rank[rank.rank] = (max(rank.step, before[0]), rank.counter)
        progress.stall_s = max(progress.stall_s, rank.stall_s)
        progress.snapshots[rank.rank] = rank.snapshot_step
        progress.checkpoint_step = max(progress.checkpoint_step, rank.checkpoint_step)
    if moved:
        if progress.stepped:
            progress.step_every.append(fleet.time.age(progress.moved_at))
        progress.moved_at = fleet.time.now
    steps = [step for step, _ in progress.by_rank.values() if step >= 0]
    world = entry.attempts[-1].layout
    complete = len(steps) == math.prod(int(world[name]) for name in ("dp", "pp", "cp", "tp"))
    if complete or progress.stepped:
        progress.step = max(progress.step, min(steps, default=-1))
    floor = entry.attempts[-1].parent_step or 0
    if not progress.stepped and progress.step > floor:
        progress.stepped = True
        return True
    return progress.replaying and progress.stepped and progress.step > entry.steps_done


def write_events(writer: Writer, member: Member, events: Iterable[wire.Event], known: set[str]) -> None:
    """Points into the curve, what people should see into the timeline, the rest nowhere."""
    for event in events:
        if event.job not in known:
            continue
        if event.kind == "points":
            writer.add_points(event.job, _points(event.attempt, event.data.get("points", ()), writer.now))
        elif event.kind == "evaluation":
            writer.add_evaluations(event.job, _evaluation(event, writer.now))
        elif event.kind in _SHOWN:
            text = str(event.data.get("text", event.kind.replace("_", " ")))[:_TEXT_MAX]
            writer.add_event(
                NewEvent(
                    kind=event.kind,
                    text=text,
                    job=JobId(event.job),
                    attempt=Attempt(event.attempt),
                    node=member.name,
                    data={"age_s": event.age_s},
                )
            )


def _points(attempt: int, points: Iterable[Any], now: float) -> Iterable[CurvePoint]:
    """`[step, age_s, loss, grad_norm, tokens_per_s, tflops, mfu]` each, as agents send them."""
    for step, age, *figures in points:
        loss, norm, tokens, tflops, mfu = (_figure(x) for x in figures)
        yield CurvePoint(
            attempt=Attempt(attempt),
            step=Step(step),
            at=now - age,
            loss=loss,
            grad_norm=norm,
            tokens_per_s=tokens,
            tflops=tflops,
            mfu=mfu,
        )


def _evaluation(event: wire.Event, now: float) -> Iterable[Evaluation]:
    for source, loss in event.data.get("losses", {}).items():
        yield Evaluation(
            attempt=Attempt(event.attempt), step=Step(event.data["step"]), source=source,
            at=now - event.age_s, loss=_figure(loss),
        )  # fmt: skip


def _figure(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def exists(writer: Writer, job: str) -> bool:
    try:
        return writer.job(job).id == job
    except KeepstepError:
        return False


def progressed(writer: Writer, entry: Entry) -> None:
    row = entry.attempts[-1]
    text = f"step {entry.progress.step} is new"
    writer.add_event(
        NewEvent(
            kind="progressed",
            text=text,
            job=entry.job.id,
            attempt=row.number,
            data={"step": entry.progress.step},
        )
    )
