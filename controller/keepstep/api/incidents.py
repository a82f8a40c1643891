"""Incidents over REST: the page that `explain` prints."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from keepstep.api.auth import Control, Viewer
from keepstep.store.rows import Incident

router = APIRouter(tags=["incidents"])


@router.get("/incidents")
async def incidents(
    control: Control,
    who: Viewer,
    job: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: int | None = None,
) -> dict[str, Any]:
    """Newest first."""
    of = (await control.on_store(control.store.job, job)).id if job else None
    page = await control.on_store(control.store.incidents, job=of, limit=limit, after=after)
    return {"incidents": [told(incident) for incident in page.items], "next": page.next}


@router.get("/jobs/{ref}/incidents")
async def of_job(control: Control, who: Viewer, ref: str) -> dict[str, Any]:
    return await incidents(control, who, job=ref, limit=1000)


@router.get("/incidents/{number}")
async def incident(control: Control, who: Viewer, number: int) -> dict[str, Any]:
    """One incident whole: the evidence, what was decided and rejected, and what happened then."""
    row = await control.on_store(control.store.incident, number)
    page = told(row)
    page["decision"] = None
    if row.decision is not None:
        page["decision"] = asdict(await control.on_store(control.store.decision, row.decision))
    if row.job is not None:
        events = await control.on_store(control.store.events, job=row.job, limit=1000)
        page["timeline"] = [asdict(event) for event in events.items if event.incident == number]
        attempts = await control.on_store(control.store.attempts, row.job)
        after = next((a for a in attempts if row.attempt is not None and a.number == row.attempt + 1), None)
        page["next_attempt"] = asdict(after) if after else None
    return page


def told(row: Incident) -> dict[str, Any]:
    """With the times that people ask for: seconds after it happened, as far as that is known."""
    began = row.opened_at - float(row.evidence.get("began_s", 0.0))
    seconds = {
        name: None if at is None else round(at - began, 3)
        for name, at in (
            ("detected", row.opened_at),
            ("decided", row.decided_at),
            ("recovered", row.recovered_at),
            ("closed", row.closed_at),
        )
    }
    return {**asdict(row), "began_at": began, "seconds": seconds}
