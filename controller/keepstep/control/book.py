"""The jobs that are not finished, as the store has them, kept at hand for the next decision.

The controller is the only writer of its store, so a job is read again only after something was written for
it. Beside the rows stands what only a running controller knows: how far the gang has come, and since when.
"""

import itertools
import statistics
from collections import deque
from dataclasses import dataclass, field, replace

from keepstep.control.observed import ObservedTime
from keepstep.control.pace import Paces
from keepstep.control.shares import shares
from keepstep.core.durations import Usual, added
from keepstep.core.ids import Attempt, JobId, Node, Step
from keepstep.core.job import JobSpec
from keepstep.core.layout import Layout
from keepstep.decide.view import Asked, Ended, Examined, Failure, Inventory, Link, Measured, Saving
from keepstep.spec import from_dict
from keepstep.store import Store
from keepstep.store.rows import AttemptRow, Incident, Job
from keepstep.wire.messages import PhaseSeen


@dataclass(slots=True)
class Progress:
    """Of one attempt, from its reports."""

    attempt: int
    step: int = -1  # the gang's: the least over its ranks, the most over time
    moved_at: float = 0.0  # observed time of the last advance of any rank
    stepped: bool = False
    by_rank: dict[int, tuple[int, int]] = field(default_factory=dict)  # rank -> (step, counter)
    counted_at: float | None = None  # when any counter of a rank last moved
    step_every: deque[float] = field(
        default_factory=lambda: deque(maxlen=8)
    )  # seconds between the last steps
    state_since: float = 0.0
    state: str = ""
    replaying: bool = True  # has not come past the newest step of earlier attempts yet
    stall_s: float = 0.0  # training time lost to checkpoints, the most of any rank
    checkpoint_step: int = -1
    phases: dict[Node, tuple[PhaseSeen, ...]] = field(default_factory=dict)  # as each node last told
    bubbles: dict[Node, float] = field(default_factory=dict)  # seconds, of what was waited in them
    paces: Paces = field(default_factory=Paces)
    losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=128))  # by step
    learnt_at: float = -1.0  # observed time at which they were last added up
    snapshots: dict[int, int] = field(default_factory=dict)  # rank -> its newest step in memory

    def shares(self) -> dict[str, float]:
        """Of the time in steps, by what it was spent on; empty while nothing is known."""
        return shares(itertools.chain(*self.phases.values()), sum(self.bubbles.values()))

    @property
    def snapshot_step(self) -> int:
        """The newest step that all ranks have in memory, as far as they have said."""
        complete = len(self.snapshots) == len(self.by_rank)
        return min(self.snapshots.values(), default=-1) if complete else -1


@dataclass(slots=True)
class Entry:
    job: Job
    spec: JobSpec
    attempts: list[AttemptRow]
    incidents: list[Incident]  # newest first
    progress: Progress
    steps_done: int = -1
    queued_at: float = 0.0
    grace: tuple[Attempt, float] | None = None  # of an attempt that moves off nodes which will go; seconds
    lacks: str = ""  # why its pool has not brought up what it needs
    inventory: Inventory | None = None
    asked: dict[Node, tuple[str, float]] = field(default_factory=dict)
    earlier: dict[str, Usual] = field(default_factory=dict)  # durations of phases in attempts that are over
    usual: dict[str, Usual] = field(default_factory=dict)  # and with the present one
    examined: deque[tuple[float, Examined]] = field(default_factory=lambda: deque(maxlen=2))
    due: tuple[str, float] | None = None  # what is waited for, and until which observed time
    examining: bool = False
    saving: tuple[float, Saving] | None = None  # since when
    found: dict[str, float] = field(default_factory=dict)  # what was told of the attempt, and when

    @property
    def present(self) -> AttemptRow | None:
        """The attempt that has not ended, if there is one."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].ended_at is None else None

    @property
    def open_incident(self) -> Incident | None:
        return next((i for i in self.incidents if i.state in {"open", "recovering", "waiting"}), None)

    def ended(self) -> Ended | None:
        """The last attempt that is over."""
        row = next((row for row in reversed(self.attempts) if row.ended_at is not None), None)
        if row is None:
            return None
        return Ended(
            number=row.number, nodes=row.nodes, spares=row.spares, layout=layout_of(row), how=row.outcome
        )

    def lineage(self) -> tuple[Link, ...]:
        good: dict[Attempt, Step] = {}
        for incident in self.incidents:
            until = incident.evidence.get("not_after")
            if incident.attempt is not None and until is not None:
                good[incident.attempt] = min(Step(until), good.get(incident.attempt, Step(until)))
        return tuple(
            Link(
                attempt=row.number,
                parent=Attempt(row.parent_attempt or 0),
                parent_step=Step(row.parent_step or 0),
                good_until=good.get(row.number),
            )
            for row in self.attempts
        )

    def failures(self, wall: float) -> tuple[Failure, ...]:
        return tuple(
            Failure(
                age_s=max(0.0, wall - incident.opened_at),
                blame=incident.evidence.get("blame", "job"),
                attempt=incident.attempt or Attempt(0),
                step=incident.evidence.get("step", -1),
                signature=incident.evidence.get("signature", ""),
                node=incident.culprit.get("node"),
                exit_code=incident.evidence.get("exit_code"),
                error=incident.evidence.get("error", ""),
                rank=incident.culprit.get("rank"),
                not_after=incident.evidence.get("not_after"),
            )
            for incident in reversed(self.incidents)
        )

    def learn(self) -> None:
        """Add up how long phases take."""
        parts: dict[str, list[Usual]] = {phase: [usual] for phase, usual in self.earlier.items()}
        for told in self.progress.phases.values():
            for seen in told:
                parts.setdefault(seen.phase, []).append(
                    Usual(count=seen.count, origins=seen.ranks, longest_s=seen.longest_s, bins=seen.bins)
                )
        self.usual = {phase: added(each) for phase, each in parts.items()}

    def measured(self) -> Measured:
        starts: dict[str, list[float]] = {}
        for row in self.attempts:
            if row.first_step_at is not None:
                starts.setdefault(row.rung, []).append(max(0.0, row.first_step_at - row.placed_at))
        return Measured(starts={rung: statistics.median(seconds) for rung, seconds in starts.items()})

    def due_s(self, time: ObservedTime) -> float | None:
        """When the wait that the job's reason speaks of is over."""
        return None if self.due is None else max(0.0, self.due[1] - time.now)

    def closely(self, time: ObservedTime) -> tuple[Examined, ...]:
        return tuple(replace(one, age_s=time.age(at)) for at, one in self.examined)

    def saved(self, time: ObservedTime) -> Saving | None:
        return None if self.saving is None else replace(self.saving[1], age_s=time.age(self.saving[0]))

    def asking(self, time: ObservedTime) -> tuple[Asked, ...]:
        return tuple(
            Asked(kind=kind, node=node, age_s=time.age(at)) for node, (kind, at) in self.asked.items()
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """One job as it was read from the store, at one moment."""

    job: Job
    attempts: list[AttemptRow]
    incidents: list[Incident]  # newest first
    newest_step: int


class Book:
    """Read on the store's thread, taken over on the event loop's: a decision never sees half a job."""

    def __init__(self, store: Store, time: ObservedTime) -> None:
        self._store, self._time = store, time
        self.entries: dict[JobId, Entry] = {}

    def read_all(self) -> list[Rows]:
        """Every job that is not finished."""
        return [self._rows(job) for job in self._store.unfinished_jobs()]

    def read(self, job: JobId) -> Rows:
        return self._rows(self._store.job(job))

    def take(self, rows: Rows) -> None:
        job, attempts = rows.job, rows.attempts
        if job.finished_at is not None:
            self.entries.pop(job.id, None)
            return
        entry = self.entries.get(job.id)
        if entry is None:
            entry = self.entries[job.id] = Entry(
                job=job,
                spec=from_dict(job.spec),
                attempts=attempts,
                incidents=rows.incidents,
                progress=Progress(attempt=0),
                queued_at=self._time.now,
                steps_done=rows.newest_step,
            )
        if job.state == "queued" and entry.job.state != "queued":
            entry.queued_at = self._time.now
        entry.job, entry.attempts, entry.incidents = job, attempts, rows.incidents
        number = attempts[-1].number if attempts else 0
        if entry.progress.attempt != number:
            entry.learn()
            entry.earlier = entry.usual
            before = entry.progress.losses
            entry.progress = Progress(attempt=number, moved_at=self._time.now)
            start = (attempts[-1].parent_step or 0) if attempts else 0
            entry.progress.losses.extend(point for point in before if point[0] <= start)
            entry.inventory, entry.asked, entry.saving = None, {}, None
            entry.examined.clear()
            entry.found.clear()
        state = attempts[-1].state if attempts else ""
        progress = entry.progress
        if progress.state != state:
            progress.state, progress.state_since = state, self._time.now
            seen = bool(attempts) and attempts[-1].first_step_at is not None
            progress.stepped = progress.stepped or seen
            if state == "starting":
                progress.moved_at = self._time.now

    def _rows(self, job: Job) -> Rows:
        return Rows(
            job,
            self._store.attempts(job.id),
            list(self._store.incidents(job=job.id, limit=1000).items),
            self._store.newest_step(job.id),
        )


def layout_of(row: AttemptRow) -> Layout:
    return Layout(**{name: int(row.layout[name]) for name in ("dp", "pp", "cp", "tp")})
