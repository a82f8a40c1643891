"""What can be asked of the store. Every list is bounded; what is not there is NotFound, with a guess.

A Reader asks through connections of its own, one a question; a Writer is a Reader that asks inside its
transaction, so it sees what it has written.
"""

import difflib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import sqlalchemy as sa

from keepstep.core.errors import InputError, NotFound
from keepstep.store import tables
from keepstep.store.rows import (
    AttemptRow,
    Checkpoint,
    CurvePoint,
    Decision,
    Evaluation,
    Event,
    Incident,
    Job,
    LifeRow,
    NodeRow,
    Page,
    Validation,
)

LIMIT_MAX = 1000
POINTS_MAX = 10_000
_GUESSED_FROM = 500  # newest jobs whose names are compared with a mistyped one

T = TypeVar("T")

_INCIDENT = [c for c in tables.incidents.c if c.name not in {"culprit_node", "culprit_rank"}]
_POINT = [c for c in tables.points.c if c.name != "job"]


class Reader:
    def __init__(self, connect: Callable[[], AbstractContextManager[sa.Connection]]) -> None:
        self._connect = connect

    # jobs

    def job(self, ref: str, *, project: str | None = None) -> Job:
        """The job of an id, of `@last`, of a name (its newest), or of a prefix that fits one id only."""
        jobs = tables.jobs
        query = sa.select(jobs).order_by(jobs.c.number.desc())
        if project is not None:
            query = query.where(jobs.c.project == project)
        exact = (
            [query] if ref == "@last" else [query.where(jobs.c.id == ref), query.where(jobs.c.name == ref)]
        )
        for one in exact:
            if found := self._rows(one.limit(1)):
                return Job(**found[0])
        begins = query.where(jobs.c.id.startswith(ref, autoescape=True))
        found = self._rows(begins.limit(6)) if ref and ref != "@last" else []
        if len(found) == 1:
            return Job(**found[0])
        if found:
            names = ", ".join(row["id"] for row in found[:5]) + (", ..." if len(found) > 5 else "")
            raise InputError(f"{ref} fits more than one job", why=names, next="Give more letters of the id.")
        raise self._no_job(ref, query)

    def jobs(
        self,
        *,
        states: Iterable[str] | None = None,
        project: str | None = None,
        name: str | None = None,
        limit: int = 100,
        after: int | None = None,
    ) -> Page[Job]:
        """Newest first; `after` is the number of the last job of the page before."""
        jobs = tables.jobs
        query = sa.select(jobs).order_by(jobs.c.number.desc())
        if states is not None:
            query = query.where(jobs.c.state.in_(list(states)))
        if project is not None:
            query = query.where(jobs.c.project == project)
        if name is not None:
            query = query.where(jobs.c.name == name)
        if after is not None:
            query = query.where(jobs.c.number < after)
        return self._page(query, limit, Job, "number")

    def unfinished_jobs(self) -> list[Job]:
        """All that still want something, oldest first: what a controller starts from."""
        jobs = tables.jobs
        query = sa.select(jobs).where(jobs.c.finished_at.is_(None)).order_by(jobs.c.number)
        return [Job(**row) for row in self._rows(query)]

    def attempts(self, job: str) -> list[AttemptRow]:
        attempts = tables.attempts
        query = sa.select(attempts).where(attempts.c.job == job).order_by(attempts.c.number)
        return [_attempt(**row) for row in self._rows(query)]

    def attempt(self, job: str, number: int) -> AttemptRow:
        attempts = tables.attempts
        query = sa.select(attempts).where(attempts.c.job == job, attempts.c.number == number)
        return _attempt(**self._one(query, f"no attempt {number} of job {job}"))

    def points(
        self, job: str, *, after_step: int = -1, attempt: int | None = None, limit: int = 1000
    ) -> Page[CurvePoint]:
        """The curve by (step, attempt). A page never ends inside a step, which several attempts may share."""
        points = tables.points
        limit = max(1, min(limit, POINTS_MAX))
        query = sa.select(*_POINT).where(points.c.job == job).order_by(points.c.step, points.c.attempt)
        if attempt is not None:
            query = query.where(points.c.attempt == attempt)
        rows = self._rows(query.where(points.c.step > after_step).limit(limit + 1))
        if len(rows) <= limit:
            return Page(items=tuple(CurvePoint(**row) for row in rows))
        cut = rows[limit]["step"]
        whole = [row for row in rows if row["step"] < cut]
        if not whole:  # more attempts share this step than fit: one step is the smallest page
            whole = self._rows(query.where(points.c.step == cut))
        return Page(items=tuple(CurvePoint(**row) for row in whole), next=whole[-1]["step"])

    def evaluations(self, job: str, *, limit: int = 1000) -> tuple[Evaluation, ...]:
        """The newest ones, newest first; of each those of all its sources, by name."""
        table = tables.evaluations
        query = sa.select(table).where(table.c.job == job).order_by(table.c.at.desc(), table.c.source)
        rows = self._rows(query.limit(max(1, min(limit, POINTS_MAX))))
        return tuple(Evaluation(**{k: v for k, v in row.items() if k != "job"}) for row in rows)

    def newest_step(self, job: str) -> int:
        """The most completed steps that any attempt of the job reported; -1: none."""
        points = tables.points
        with self._connect() as connection:
            newest = connection.execute(
                sa.select(sa.func.max(points.c.step)).where(points.c.job == job)
            ).scalar()
        return -1 if newest is None else int(newest)

    def checkpoints(self, job: str) -> list[Checkpoint]:
        table = tables.checkpoints
        query = sa.select(table).where(table.c.job == job).order_by(table.c.step, table.c.attempt)
        return [Checkpoint(**row) for row in self._rows(query)]

    # nodes

    def nodes(self) -> list[NodeRow]:
        query = sa.select(tables.nodes).order_by(tables.nodes.c.name)
        return [NodeRow(**row) for row in self._rows(query)]

    def node(self, name: str) -> NodeRow:
        query = sa.select(tables.nodes).where(tables.nodes.c.name == name)
        if rows := self._rows(query):
            return NodeRow(**rows[0])
        known = [row["name"] for row in self._rows(sa.select(tables.nodes.c.name))]
        raise NotFound(f"no node {name}", next=_guess(name, known) or "`keepstep node list` shows all nodes.")

    def lives(self) -> list[LifeRow]:
        query = sa.select(tables.lives).order_by(tables.lives.c.node)
        return [LifeRow(**row) for row in self._rows(query)]

    def validations(self, node: str | None = None, *, limit: int = 100) -> list[Validation]:
        """Newest first."""
        table = tables.validations
        query = sa.select(table).order_by(table.c.id.desc()).limit(min(limit, LIMIT_MAX))
        if node is not None:
            query = query.where(table.c.node == node)
        return [Validation(**row) for row in self._rows(query)]

    def meta(self, key: str) -> str:
        rows = self._rows(sa.select(tables.meta.c.value).where(tables.meta.c.key == key))
        return str(rows[0]["value"]) if rows else ""

    # what happened

    def incidents(
        self,
        *,
        job: str | None = None,
        states: Iterable[str] | None = None,
        limit: int = 100,
        after: int | None = None,
    ) -> Page[Incident]:
        """Newest first."""
        table = tables.incidents
        query = sa.select(*_INCIDENT).order_by(table.c.id.desc())
        if job is not None:
            query = query.where(table.c.job == job)
        if states is not None:
            query = query.where(table.c.state.in_(list(states)))
        if after is not None:
            query = query.where(table.c.id < after)
        return self._page(query, limit, _incident, "id")

    def incident(self, id: int) -> Incident:  # noqa: A002 - it is one
        query = sa.select(*_INCIDENT).where(tables.incidents.c.id == id)
        return _incident(**self._one(query, f"no incident {id}", "`keepstep events` shows what happened."))

    def decisions(
        self, job: str | None = None, *, limit: int = 100, after: int | None = None
    ) -> Page[Decision]:
        """Newest first."""
        table = tables.decisions
        query = sa.select(table).order_by(table.c.id.desc())
        if job is not None:
            query = query.where(table.c.job == job)
        if after is not None:
            query = query.where(table.c.id < after)
        return self._page(query, limit, Decision, "id")

    def decision(self, id: int) -> Decision:  # noqa: A002 - it is one
        query = sa.select(tables.decisions).where(tables.decisions.c.id == id)
        return Decision(**self._one(query, f"no decision {id}"))

    def events(
        self, *, after: int = 0, job: str | None = None, node: str | None = None, limit: int = 200
    ) -> Page[Event]:
        """The timeline past an event, oldest first. Numbers grow in the order of commits: none is skipped."""
        table = tables.timeline
        query = sa.select(table).where(table.c.id > after).order_by(table.c.id)
        if job is not None:
            query = query.where(table.c.job == job)
        if node is not None:
            query = query.where(table.c.node == node)
        return self._page(query, limit, Event, "id")

    def last_event(self) -> int:
        """The newest event's number, 0 before the first."""
        return int(self._rows(sa.select(sa.func.max(tables.timeline.c.id).label("id")))[0]["id"] or 0)

    # how it is asked

    def _rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        with self._connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _one(self, query: sa.Select[Any], otherwise: str, what_next: str = "") -> dict[str, Any]:
        rows = self._rows(query)
        if not rows:
            raise NotFound(otherwise, next=what_next)
        return rows[0]

    def _page(self, query: sa.Select[Any], limit: int, make: Callable[..., T], key: str) -> Page[T]:
        limit = max(1, min(limit, LIMIT_MAX))
        rows = self._rows(query.limit(limit + 1))
        more = len(rows) > limit
        rows = rows[:limit]
        return Page(items=tuple(make(**row) for row in rows), next=rows[-1][key] if more else None)

    def _no_job(self, ref: str, query: sa.Select[Any]) -> NotFound:
        rows = self._rows(query.limit(_GUESSED_FROM))
        if not rows:
            return NotFound("there are no jobs yet", next="`keepstep submit job.yaml` starts one.")
        known = [word for row in rows for word in (row["id"], row["name"])]
        return NotFound(f"no job {ref}", next=_guess(ref, known) or "`keepstep list` shows all jobs.")


def _attempt(*, nodes: list[Any], spares: list[Any], **rest: Any) -> AttemptRow:
    return AttemptRow(nodes=tuple(nodes), spares=tuple(spares), **rest)


def _incident(*, same_before: list[int], **rest: Any) -> Incident:
    return Incident(same_before=tuple(same_before), **rest)


def _guess(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(near)}?" if near else ""
