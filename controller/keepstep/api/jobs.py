"""Jobs over REST: submit, look, steer."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query

from keepstep.api.auth import Control, Submitter, Viewer
from keepstep.api.describe import attempt_of, describe_job, preview, ranks_of
from keepstep.control import requests
from keepstep.control.examination import closely
from keepstep.control.ledgers import job_ledger
from keepstep.core.errors import NotFound
from keepstep.core.ids import Node
from keepstep.decide.stacks import told

router = APIRouter(prefix="/jobs", tags=["jobs"])

Limit = Annotated[int, Query(ge=1, le=1000)]


@router.post("", status_code=201)
async def submit(
    control: Control,
    who: Submitter,
    spec: Annotated[dict[str, Any], Body()],
    source: Annotated[dict[str, Any] | None, Body()] = None,
    attached: Annotated[str | None, Body()] = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Accept a job. With `dry_run` only say where it would run, or why it would wait."""
    parsed = requests.parse_spec(spec)
    if dry_run:
        return preview(control, parsed)
    job = await requests.submit(
        control, parsed, who, source=source, attached=Node(attached) if attached else None
    )
    return await describe_job(control, job)


@router.get("")
async def jobs(
    control: Control,
    who: Viewer,
    state: Annotated[list[str] | None, Query()] = None,
    name: str | None = None,
    project: str | None = None,
    limit: Limit = 100,
    after: int | None = None,
) -> dict[str, Any]:
    page = await control.on_store(
        control.store.jobs, states=state, name=name, project=project, limit=limit, after=after
    )
    return {"jobs": [await describe_job(control, job) for job in page.items], "next": page.next}


@router.get("/{ref}")
async def job(control: Control, who: Viewer, ref: str) -> dict[str, Any]:
    return await describe_job(control, await control.on_store(control.store.job, ref), whole=True)


@router.get("/{ref}/ranks")
async def ranks(control: Control, who: Viewer, ref: str) -> dict[str, Any]:
    row = await control.on_store(control.store.job, ref)
    return {"job": row.id, "attempt": row.attempt, "ranks": await ranks_of(control, row)}


@router.get("/{ref}/stacks")
async def stacks(control: Control, who: Viewer, ref: str) -> dict[str, Any]:
    """A close look at every rank, now: stacks, processes, what they wait for in the kernel."""
    row = await control.on_store(control.store.job, ref)
    entry = control.book.entries.get(row.id)
    present = entry.present if entry else None
    if present is None:
        raise NotFound(f"job {row.id} runs nowhere", why=row.reason, next=f"keepstep describe {row.id}")
    found = await closely(
        control.fleet, row.id, present.number, present.nodes,
        term=control.store.term, within_s=control.policy.examine_within_s,
    )  # fmt: skip
    return {
        "job": row.id,
        "attempt": present.number,
        "ranks": [asdict(finding) for finding in found.findings],
        "lines": list(told(found.findings)),
        "errors": list(found.errors),
    }


@router.get("/{ref}/attempts")
async def attempts(control: Control, who: Viewer, ref: str) -> dict[str, Any]:
    row = await control.on_store(control.store.job, ref)
    found = await control.on_store(control.store.attempts, row.id)
    return {"job": row.id, "attempts": [attempt_of(attempt) for attempt in found]}


@router.get("/{ref}/decisions")
async def decisions(
    control: Control, who: Viewer, ref: str, limit: Limit = 100, after: int | None = None
) -> dict[str, Any]:
    row = await control.on_store(control.store.job, ref)
    page = await control.on_store(control.store.decisions, row.id, limit=limit, after=after)
    return {"job": row.id, "decisions": [asdict(decision) for decision in page.items], "next": page.next}


@router.get("/{ref}/metrics")
async def metrics(
    control: Control,
    who: Viewer,
    ref: str,
    after_step: int = -1,
    attempt: int | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> dict[str, Any]:
    """The loss curve: completed steps with loss, gradient norm, tokens/s, TFLOPs per GPU and MFU."""
    row = await control.on_store(control.store.job, ref)
    page = await control.on_store(
        control.store.points, row.id, after_step=after_step, attempt=attempt, limit=limit
    )
    return {"job": row.id, "points": [asdict(point) for point in page.items], "next": page.next}


@router.get("/{ref}/evaluations")
async def evaluations(
    control: Control, who: Viewer, ref: str, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000
) -> dict[str, Any]:
    """Losses on text that is not trained on, newest first; source "" is the mean over all sources."""
    row = await control.on_store(control.store.job, ref)
    found = await control.on_store(control.store.evaluations, row.id, limit=limit)
    return {"job": row.id, "evaluations": [asdict(one) for one in found]}


@router.get("/{ref}/goodput")
async def goodput(control: Control, who: Viewer, ref: str) -> dict[str, Any]:
    row = await control.on_store(control.store.job, ref)
    return await control.on_store(job_ledger, control.store, row, control.clock.wall())


@router.post("/{ref}/{verb}")
async def steer(
    control: Control, who: Submitter, ref: str, verb: str, reason: Annotated[str, Body(embed=True)] = ""
) -> dict[str, Any]:
    """cancel, suspend, resume, requeue"""
    row = await requests.steer(control, ref, verb, who, reason)
    return await describe_job(control, row)
