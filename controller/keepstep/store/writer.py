"""What can be written, inside one transaction that holds the term: all of it is kept, or nothing."""

import math
import random
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Unpack

import sqlalchemy as sa

from keepstep.core.errors import NotFound, Refused
from keepstep.core.ids import JobId, Node, Term, short
from keepstep.store import tables
from keepstep.store.engines import insert_or_update, insert_unless_there
from keepstep.store.reader import Reader
from keepstep.store.rows import (
    AttemptChanges,
    AttemptRow,
    CurvePoint,
    Decision,
    Evaluation,
    Event,
    Incident,
    IncidentChanges,
    Job,
    JobChanges,
    NewEvent,
    NodeChanges,
    NodeRow,
)

_ID_TRIES = 20
_SAME_MAX = 20  # earlier incidents that a new one names

_NEW_NODE: dict[str, Any] = {
    "pool": "",
    "role": "",
    "instance": "",
    "slots": 0,
    "state": "",
    "state_reason": "",
    "addresses": [],
    "labels": {},
    "gpus": [],
    "boot_id": "",
    "versions": {},
}


class Writer(Reader):
    """Made by `Store.transaction`. `now` is one wall-clock moment for everything that is written here."""

    def __init__(self, connection: sa.Connection, *, term: Term, now: float, chance: random.Random) -> None:
        super().__init__(lambda: nullcontext(connection))
        self._connection = connection
        self._chance = chance
        self.term = term
        self.now = now

    # jobs

    def add_job(
        self,
        *,
        name: str,
        spec: Any,
        pool: str,
        queue: str = "default",
        priority: int = 0,
        project: str = "default",
        principal: str = "",
        source: Any = None,
        attached_node: Node | None = None,
        state: str = "queued",
        reason: str = "",
        restarts: Any = None,
    ) -> Job:
        """Accepts a job: gives it a number and an id, its name with four letters."""
        newest = self._connection.execute(sa.select(sa.func.max(tables.jobs.c.number))).scalar()
        row = {
            "id": self._job_id(name),
            "number": (newest or 0) + 1,
            "name": name,
            "project": project,
            "principal": principal,
            "spec": spec,
            "source": {} if source is None else source,
            "pool": pool,
            "queue": queue,
            "priority": priority,
            "attached_node": attached_node,
            "wanted": "run",
            "wanted_by": principal,
            "wanted_reason": "",
            "state": state,
            "reason": reason,
            "attempt": 0,
            "restarts": {} if restarts is None else restarts,
            "created_at": self.now,
        }
        self._connection.execute(sa.insert(tables.jobs).values(row))
        return self.job(row["id"])

    def update_job(self, job: str, **changes: Unpack[JobChanges]) -> Job:
        self._update(tables.jobs, tables.jobs.c.id == job, dict(changes), f"no job {job}")
        return self.job(job)

    def add_attempt(
        self,
        *,
        job: str,
        number: int,
        nodes: Sequence[Node],
        spares: Sequence[Node] = (),
        layout: Any,
        state: str,
        rung: str = "",
        reason: str = "",
        parent: tuple[int, int] | None = None,
        restore: Any = None,
        master: Any = None,
    ) -> AttemptRow:
        """Orders the next attempt and makes it the job's present one. Numbers have no gaps and no repeats."""
        of_job = tables.jobs.c.id == job
        last = self._connection.execute(sa.select(tables.jobs.c.attempt).where(of_job)).scalar()
        if last is None:
            raise NotFound(f"no job {job}")
        if number != last + 1:
            raise Refused(f"attempt {number} of {job} cannot be ordered", why=f"the present one is {last}")
        parent_attempt, parent_step = parent or (None, None)
        row = {
            "job": job,
            "number": number,
            "term": self.term,
            "parent_attempt": parent_attempt,
            "parent_step": parent_step,
            "state": state,
            "rung": rung,
            "reason": reason,
            "nodes": list(nodes),
            "spares": list(spares),
            "layout": layout,
            "restore": restore,
            "master": master,
            "placed_at": self.now,
            "outcome": "",
        }
        self._connection.execute(sa.insert(tables.attempts).values(row))
        self._connection.execute(sa.update(tables.jobs).where(of_job).values(attempt=number))
        return self.attempt(job, number)

    def update_attempt(self, job: str, number: int, **changes: Unpack[AttemptChanges]) -> AttemptRow:
        table = tables.attempts
        self._update(
            table,
            sa.and_(table.c.job == job, table.c.number == number),
            dict(changes),
            f"no attempt {number} of job {job}",
        )
        return self.attempt(job, number)

    def add_points(self, job: str, points: Iterable[CurvePoint]) -> None:
        """Adds to the curve. A point that is there already stays as it is."""
        rows = [
            {
                "job": job,
                "attempt": point.attempt,
                "step": point.step,
                "at": point.at,
                "loss": _number(point.loss),
                "grad_norm": _number(point.grad_norm),
                "tokens_per_s": _number(point.tokens_per_s),
                "tflops": _number(point.tflops),
                "mfu": _number(point.mfu),
            }
            for point in points
        ]
        if rows:
            self._connection.execute(insert_unless_there(self._connection, tables.points), rows)

    def add_evaluations(self, job: str, found: Iterable[Evaluation]) -> None:
        """Adds to those that are there, which stay as they are."""
        rows = [{"job": job, **asdict(one), "loss": _number(one.loss)} for one in found]
        if rows:
            self._connection.execute(insert_unless_there(self._connection, tables.evaluations), rows)

    def add_checkpoints(self, job: str, seen: Iterable[tuple[int, int, bool]]) -> None:
        """Records (attempt, step, complete) of folders that were seen."""
        rows = [
            {"job": job, "attempt": attempt, "step": step, "seen_at": self.now, "complete": complete}
            for attempt, step, complete in seen
        ]
        if rows:
            insert = insert_or_update(self._connection, tables.checkpoints, "seen_at", "complete")
            self._connection.execute(insert, rows)

    def drop_checkpoints(self, job: str, gone: Iterable[tuple[int, int]]) -> None:
        """Forgets (attempt, step) of folders that are no longer there."""
        table = tables.checkpoints
        for attempt, step in gone:
            self._connection.execute(
                sa.delete(table).where(table.c.job == job, table.c.attempt == attempt, table.c.step == step)
            )

    # nodes

    def upsert_node(self, name: str, **changes: Unpack[NodeChanges]) -> NodeRow:
        """Sets the fields that are named, of a node that is new or known; it was seen now."""
        known = sa.select(tables.nodes.c.name).where(tables.nodes.c.name == name)
        if self._connection.execute(known).scalar() is None:
            seen = {"name": name, "first_seen": self.now, "last_seen": self.now}
            self._connection.execute(sa.insert(tables.nodes).values(_NEW_NODE | seen | changes))
        else:
            values = {**changes, "last_seen": self.now}
            self._update(tables.nodes, tables.nodes.c.name == name, values, f"no node {name}")
        return self.node(name)

    def save_life(self, node: str, *, state: str, owner: str, reason: str, revision: int, data: Any) -> None:
        row = {
            "node": node, "state": state, "owner": owner, "reason": reason, "revision": revision,
            "changed_at": self.now, "data": data,
        }  # fmt: skip
        columns = [name for name in row if name != "node"]
        self._connection.execute(insert_or_update(self._connection, tables.lives, *columns), [row])

    def add_validation(self, node: str, *, job: str, passed: bool, text: str, figures: Any) -> None:
        row = {"node": node, "at": self.now, "job": job, "passed": passed, "text": text, "figures": figures}
        self._insert(tables.validations, row)

    def set_meta(self, key: str, value: str) -> None:
        insert = insert_or_update(self._connection, tables.meta, "value")
        self._connection.execute(insert, [{"key": key, "value": value}])

    # what happened

    def add_incident(
        self,
        *,
        job: str | None,
        attempt: int | None,
        verdict: str,
        state: str = "open",
        culprit: Any = None,
        evidence: Any = None,
        project: str = "",
        opened_at: float | None = None,
    ) -> Incident:
        """Opens an incident; names earlier ones of its verdict on this node or at this rank of the job."""
        culprit = {} if culprit is None else culprit
        node, rank = culprit.get("node"), culprit.get("rank")
        row = {
            "project": project or self._project(job),
            "job": job,
            "attempt": attempt,
            "verdict": verdict,
            "state": state,
            "culprit": culprit,
            "culprit_node": node,
            "culprit_rank": rank,
            "evidence": {} if evidence is None else evidence,
            "opened_at": self.now if opened_at is None else opened_at,
            "costs": {},
            "same_before": self._same_before(verdict, job, node, rank),
        }
        return self.incident(self._insert(tables.incidents, row))

    def update_incident(self, id: int, **changes: Unpack[IncidentChanges]) -> Incident:  # noqa: A002 - it is one
        values: dict[str, Any] = dict(changes)
        if "culprit" in changes:
            culprit = changes["culprit"] or {}
            values |= {"culprit_node": culprit.get("node"), "culprit_rank": culprit.get("rank")}
        self._update(tables.incidents, tables.incidents.c.id == id, values, f"no incident {id}")
        return self.incident(id)

    def add_decision(
        self,
        *,
        job: str | None,
        kind: str,
        reason: str,
        rejected: Any = (),
        plan: Any = None,
        slice: Any = None,  # noqa: A002 - of the view
        project: str = "",
    ) -> Decision:
        row = {
            "at": self.now,
            "term": self.term,
            "project": project or self._project(job),
            "job": job,
            "kind": kind,
            "reason": reason,
            "rejected": list(rejected),
            "plan": {} if plan is None else plan,
            "slice": {} if slice is None else slice,
        }
        return self.decision(self._insert(tables.decisions, row))

    def add_event(self, event: NewEvent) -> Event:
        row = {
            "at": self.now,
            "project": event.project or self._project(event.job),
            "principal": event.principal,
            "job": event.job,
            "attempt": event.attempt,
            "node": event.node,
            "incident": event.incident,
            "kind": event.kind,
            "text": event.text,
            "data": event.data,
        }
        return self.events(after=self._insert(tables.timeline, row) - 1, limit=1).items[0]

    def add_events(self, events: Iterable[NewEvent]) -> list[Event]:
        return [self.add_event(event) for event in events]

    # how it is written

    def _insert(self, table: sa.Table, row: dict[str, Any]) -> int:
        key = self._connection.execute(sa.insert(table).values(row)).inserted_primary_key
        assert key is not None
        return int(key[0])

    def _update(
        self, table: sa.Table, where: sa.ColumnElement[bool], values: dict[str, Any], otherwise: str
    ) -> None:
        if not values:
            return
        if self._connection.execute(sa.update(table).where(where).values(values)).rowcount == 0:
            raise NotFound(otherwise)

    def _job_id(self, name: str) -> JobId:
        for _ in range(_ID_TRIES):
            candidate = f"{name}-{short(self._chance)}"
            taken = sa.select(tables.jobs.c.id).where(tables.jobs.c.id == candidate)
            if self._connection.execute(taken).scalar() is None:
                return JobId(candidate)
        raise Refused(
            f"no free id was found for a job named {name}",
            why=f"{_ID_TRIES} in a row were taken",
            next="Give the job another name.",
        )

    def _project(self, job: str | None) -> str:
        if job is None:
            return ""
        query = sa.select(tables.jobs.c.project).where(tables.jobs.c.id == job)
        return str(self._connection.execute(query).scalar() or "")

    def _same_before(self, verdict: str, job: str | None, node: str | None, rank: int | None) -> list[int]:
        table = tables.incidents
        like = []
        if node is not None:
            like.append(table.c.culprit_node == node)
        if job is not None and rank is not None:
            like.append(sa.and_(table.c.job == job, table.c.culprit_rank == rank))
        if not like:
            return []
        query = sa.select(table.c.id).where(table.c.verdict == verdict, sa.or_(*like))
        newest = self._connection.execute(query.order_by(table.c.id.desc()).limit(_SAME_MAX)).scalars()
        return sorted(newest)


def _number(value: float | None) -> float | None:
    """A figure as every database keeps it: PostgreSQL has NaN, SQLite has not."""
    return None if value is None or math.isnan(value) else value
