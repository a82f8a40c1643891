"""Logs of ranks, pulled from the nodes that have them and streamed as lines of JSON."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from keepstep.api.auth import Control, Viewer
from keepstep.control.book import layout_of
from keepstep.control.loop import Controller
from keepstep.core.errors import InputError, KeepstepError, NotFound
from keepstep.core.ids import JobId, Node
from keepstep.core.layout import Layout, local_ranks
from keepstep.core.states import JOB
from keepstep.store.rows import AttemptRow

router = APIRouter(tags=["logs"])

_WITHIN_S = 30.0
_POLL_S = 10.0
_CHUNK_BYTES = 1 << 20
_FINAL = {str(state) for state in JOB.final}


@router.get("/jobs/{ref}/logs")
async def logs(
    request: Request,
    control: Control,
    who: Viewer,
    ref: str,
    rank: str | None = None,
    role: str | None = None,
    node: str | None = None,
    attempt: int | None = None,
    tail: Annotated[int | None, Query(ge=0, le=100_000)] = None,
    since_s: Annotated[float | None, Query(ge=0)] = None,
    grep: str | None = None,
    first_error: bool = False,
    follow: bool = False,
) -> StreamingResponse:
    """One JSON object a line: rank, node, attempt, line. Errors of a node are lines with `error`."""
    job = await control.on_store(control.store.job, ref)
    if first_error and attempt is None:
        attempt = await _failed_attempt(control, job.id)
    if (attempt or job.attempt) == 0 and not follow:
        raise NotFound(f"job {job.id} has no logs yet", why=job.reason, next=f"keepstep describe {job.id}")
    wanted = {
        "tail": tail,
        "since_s": since_s,
        "grep": grep,
        "first_error": first_error,
        "ranks": rank,
        "role": role,
        "node": node,
    }
    ended: asyncio.Event = request.app.state.streams
    lines = _lines(control, ended, job.id, attempt, wanted, follow=follow)
    return StreamingResponse(lines, media_type="application/x-ndjson")


async def _failed_attempt(control: Controller, job: JobId) -> int | None:
    incidents = (await control.on_store(control.store.incidents, job=job, limit=1)).items
    return incidents[0].attempt if incidents else None


async def _lines(
    control: Controller,
    ended: asyncio.Event,
    job: JobId,
    attempt: int | None,
    wanted: dict[str, Any],
    *,
    follow: bool,
) -> AsyncIterator[str]:
    number = attempt
    seen = 0
    while not ended.is_set():
        row = await control.on_store(control.store.job, job)
        number = attempt or row.attempt
        if number > seen or (number and not follow):
            seen = number
            placed = await control.on_store(control.store.attempt, job, number)
            async for line in _attempt(control, ended, placed, wanted, follow=follow):
                yield json.dumps(line) + "\n"
        if not follow or attempt is not None:
            return
        row = await control.on_store(control.store.job, job)
        if row.state in _FINAL and row.attempt <= seen:
            return
        told = control.told
        if row.attempt <= seen:
            await asyncio.wait({asyncio.ensure_future(told.wait())}, timeout=_POLL_S)


async def _attempt(
    control: Controller, ended: asyncio.Event, row: AttemptRow, wanted: dict[str, Any], *, follow: bool
) -> AsyncIterator[dict[str, Any]]:
    """All nodes of one attempt, each in its own order, merged as they answer."""
    layout = layout_of(row)
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(1000)
    readers = []
    for node_rank, node in enumerate(row.nodes):
        ranks = _selected(layout, local_ranks(layout.world_size, len(row.nodes), node_rank), node, wanted)
        if ranks:
            readers.append(_read(control, ended, row, node, ranks, wanted, queue, follow=follow))
    tasks = [asyncio.create_task(reader) for reader in readers]
    left = len(tasks)
    try:
        while left:
            line = await queue.get()
            if line is None:
                left -= 1
            else:
                yield line
    finally:
        for task in tasks:
            task.cancel()


async def _read(
    control: Controller,
    ended: asyncio.Event,
    row: AttemptRow,
    node: Node,
    ranks: list[int],
    wanted: dict[str, Any],
    queue: "asyncio.Queue[dict[str, Any] | None]",
    *,
    follow: bool,
) -> None:
    params: dict[str, Any] = {
        "job": row.job,
        "attempt": row.number,
        "ranks": ranks,
        "tail": wanted["tail"],
        "grep": wanted["grep"],
        "since_s": wanted["since_s"],
        "first_error": wanted["first_error"],
        "max_bytes": _CHUNK_BYTES,
        "wait_s": _POLL_S if follow else 0.0,
    }
    try:
        while not ended.is_set():
            answer = await control.fleet.ask(
                node, "logs", params, term=control.store.term, within_s=_WITHIN_S + params["wait_s"]
            )
            for rank, line in answer["lines"]:
                await queue.put({"rank": rank, "node": node, "attempt": row.number, "line": line})
            params |= {"after": answer["after"], "tail": None, "since_s": None}
            if answer.get("end", True) or (not follow and not answer.get("more", False)):
                return
    except KeepstepError as problem:
        await queue.put({"rank": None, "node": node, "attempt": row.number, "error": str(problem)})
    finally:
        await queue.put(None)


def _selected(layout: Layout, local: range, node: Node, wanted: dict[str, Any]) -> list[int]:
    """The ranks of one node that `--rank`, `--role` and `--node` leave."""
    if wanted["node"] and wanted["node"] != node:
        return []
    ranks = list(local)
    if wanted["ranks"]:
        try:
            chosen = {int(rank) for rank in str(wanted["ranks"]).split(",")}
        except ValueError:
            raise InputError(
                f"rank {wanted['ranks']!r} is not a list of numbers", next="--rank 0,7"
            ) from None
        ranks = [rank for rank in ranks if rank in chosen]
    for condition in (wanted["role"] or "").split(","):
        if not condition:
            continue
        dimension, _, value = condition.partition("=")
        if dimension not in {"dp", "pp", "cp", "tp"} or not value.isdigit():
            raise InputError(f"role {condition!r} is not understood", next="--role pp=1,dp=0")
        ranks = [r for r in ranks if getattr(layout.coordinates(r), dimension) == int(value)]
    return ranks
