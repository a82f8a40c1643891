"""Where a job's slot-seconds went, from the timeline that the controller has written."""

from typing import Any

from keepstep.decide.account import Kind, Moment, ledger
from keepstep.spec import from_dict
from keepstep.store import Store
from keepstep.store.rows import Event, Job

_PAGE = 1000
_SAME: frozenset[Kind] = frozenset({"went", "stepped", "progressed", "stopping", "dead", "suspended"})
_ENDS = {"succeeded", "failed", "cancelled"}


def job_ledger(store: Store, job: Job, wall: float) -> dict[str, Any]:
    """The ledger up to now, or to the job's end."""
    until = job.finished_at if job.finished_at is not None else wall
    told = ledger(moments(store, job), until)
    return {"job": job.id, "until": until, **told.to_dict()}


def moments(store: Store, job: Job) -> list[Moment]:
    spec = from_dict(job.spec)
    wanted = spec.resources.ranks
    found: list[Moment] = []
    after = 0
    while True:
        page = store.events(after=after, job=job.id, limit=_PAGE)
        for event in page.items:
            found += _moments(event, wanted, spec.resources.gpus_per_node)
        if page.next is None:
            return found
        after = page.next


def _moments(event: Event, wanted: int, per_node: int) -> list[Moment]:
    """The moments that one line of the timeline stands for; most lines stand for none."""
    base: dict[str, Any] = {"at_s": event.at, "attempt": event.attempt, "incident": event.incident}
    data = event.data
    match event.kind:
        case "submitted":
            return [Moment(kind="submitted", slots=wanted, **base)]
        case "placed":
            spares = len(data.get("spares", ())) * per_node
            return [Moment(kind="placed", slots=data["slots"], spare_slots=spares, **base)]
        case "detected":
            began = {**base, "at_s": event.at - float(data.get("began_s", 0.0))}
            return [Moment(kind="failed", **began), Moment(kind="detected", **base)]
        case "requeued" | "resumed":
            return [Moment(kind="queued", slots=wanted, **base)]
        case "stall":
            return [Moment(kind="stall", seconds=data["seconds"], **base)]
        case "unobserved":
            return [Moment(kind="unobserved", seconds=data["seconds"], **base)]
        case kind if kind in _SAME:
            return [Moment(kind=kind, step=data.get("step"), **base)]
        case kind if kind in _ENDS:
            return [Moment(kind="finished", **base)]
        case _:
            return []
