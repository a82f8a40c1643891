"""The timeline: in pages, and as a stream of Server-Sent Events that ends when the service does."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from keepstep.api.auth import Control, Viewer
from keepstep.control.loop import Controller

router = APIRouter(prefix="/events", tags=["events"])

_KEEP_ALIVE_S = 15.0
_PAGE = 500


@router.get("")
async def events(
    control: Control,
    who: Viewer,
    after: int = 0,
    job: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> dict[str, Any]:
    of = (await control.on_store(control.store.job, job)).id if job else None
    page = await control.on_store(control.store.events, after=after, job=of, limit=limit)
    return {"events": [asdict(event) for event in page.items], "next": page.next}


@router.get("/stream")
async def stream(
    request: Request, control: Control, who: Viewer, after: int | None = None, job: str | None = None
) -> StreamingResponse:
    """Everything after `after` (or Last-Event-ID; default: from now on), as it happens."""
    of = (await control.on_store(control.store.job, job)).id if job else None
    last = request.headers.get("last-event-id", "")
    if after is None:
        after = int(last) if last.isdigit() else await control.on_store(control.store.last_event)
    ended: asyncio.Event = request.app.state.streams
    return StreamingResponse(
        _events(control, ended, after, of),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache"},
    )


async def _events(
    control: Controller, ended: asyncio.Event, after: int, job: str | None
) -> AsyncIterator[str]:
    yield ": welcome\n\n"
    while not ended.is_set():
        told = control.told
        page = await control.on_store(control.store.events, after=after, job=job, limit=_PAGE)
        for event in page.items:
            after = event.id
            yield f"id: {event.id}\nevent: {event.kind}\ndata: {json.dumps(asdict(event))}\n\n"
        if page.next is None and not await _either(told, ended, _KEEP_ALIVE_S):
            yield ": still here\n\n"


async def _either(first: asyncio.Event, second: asyncio.Event, within_s: float) -> bool:
    """Wait until one of the two is set; False when the time is over."""
    waits = [asyncio.ensure_future(first.wait()), asyncio.ensure_future(second.wait())]
    done, pending = await asyncio.wait(waits, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in pending:
        wait.cancel()
    return bool(done)
