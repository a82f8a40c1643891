"""Answers to the controller's questions: log lines, what lies in a checkpoint folder, what ranks are doing.

logs       job, attempt? (the newest here), ranks?, tail?, after? {rank: cursor}, max_bytes?, wait_s?, grep?,
           since_s? (whole files that were last written longer ago are left out: lines carry no time),
           first_error? (only the last lines of the rank that failed first on this node)
           -> {attempt, latest, lines: [[rank, line]...], after: {rank: cursor}, lost: [rank...],
               more: there is more at once, end: there never will be}
inventory  dir -> {checkpoints: [[attempt, step, complete]...], fence: attempt|null}
evidence   what each rank is doing: see inquiry
save       a state in memory becomes a checkpoint: see saving
"""

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keepstep.agent import inquiry, logs, saving
from keepstep.agent.attempt import Attempt
from keepstep.agent.launches import Launches
from keepstep.core import checkpoints
from keepstep.core.clock import Clock, SystemClock
from keepstep.core.errors import InputError, KeepstepError, NotFound
from keepstep.wire.messages import Answer, Query

_BYTES = 256 << 10
_BYTES_MAX = 2 << 20  # half of what a message may hold
_WAIT_MAX_S = 60.0
_LOOK_S = 0.1
_TAIL_MAX = 100_000
_ERROR_LINES = 50
_CHECKPOINTS_MAX = 20_000


async def answer(query: Query, launches: Launches, clock: Clock) -> Answer:
    try:
        match query.kind:
            case "logs":
                data = await _logs(query.params, launches, clock)
            case "inventory":
                data = await asyncio.to_thread(_inventory, query.params)
            case "evidence":
                data = await inquiry.gather(query.params, launches)
            case "save":
                data = await saving.save(query.params, launches.around.carriers)
            case _:
                raise InputError(f"this agent does not know the question {query.kind!r}")
    except (KeepstepError, OSError, ValueError, TypeError, LookupError, re.error) as error:
        # Parameters come from outside, folders may be unreadable: both are the asker's to know.
        return Answer(id=query.id, error=str(error) if isinstance(error, KeepstepError) else repr(error))
    return Answer(id=query.id, data=data)


def _inventory(params: Mapping[str, Any]) -> dict[str, Any]:
    folder = Path(str(params["dir"]))
    found = checkpoints.inventory(folder)
    return {
        "checkpoints": [[one.at.attempt, one.at.step, one.complete] for one in found[-_CHECKPOINTS_MAX:]],
        "fence": checkpoints.read_fence(folder),
    }


async def _logs(params: Mapping[str, Any], launches: Launches, clock: Clock) -> dict[str, Any]:
    job = str(params["job"])
    latest = launches.latest(job)
    number = int(params.get("attempt") or latest or 0)
    directory = launches.around.folder.attempt(job, number)
    if not directory.is_dir():
        raise NotFound(f"attempt {number} of {job} has no logs on this node")
    deadline = clock.monotonic() + min(float(params.get("wait_s") or 0.0), _WAIT_MAX_S)
    while True:
        attempt = launches.attempts.get((job, number))
        ended = attempt is None or not attempt.living
        if params.get("first_error"):
            params = {**params, "ranks": _first_failed(attempt), "tail": params.get("tail") or _ERROR_LINES}
        found = await asyncio.to_thread(_read, params, directory, ended)
        over = bool(params.get("first_error")) or (ended and not found["more"])
        if found["lines"] or found["more"] or over or clock.monotonic() >= deadline:
            return {"attempt": number, "latest": launches.latest(job), "end": over, **found}
        params = {**params, "after": found["after"]}
        await asyncio.sleep(_LOOK_S)


def _first_failed(attempt: Attempt | None) -> list[int]:
    ranks = attempt.status().ranks if attempt is not None else ()
    failed = [rank for rank in ranks if rank.state == "exited" and rank.exit_code != 0]
    return [rank.rank for rank in sorted(failed, key=lambda rank: rank.exit_order or len(ranks) + 1)[:1]]


def _read(params: Mapping[str, Any], directory: Path, ended: bool) -> dict[str, Any]:
    named = params.get("ranks")
    ranks = [int(rank) for rank in (logs.ranks_with_logs(directory) if named is None else named)]
    begin = logs.cursors(params.get("after"))
    lines_max = min(int(params["tail"]), _TAIL_MAX) if params.get("tail") is not None else None
    pattern = re.compile(str(params["grep"])) if params.get("grep") else None
    share = max(4096, min(int(params.get("max_bytes") or _BYTES), _BYTES_MAX) // max(1, len(ranks)))
    oldest = None if params.get("since_s") is None else SystemClock().wall() - float(params["since_s"])
    lines: list[list[Any]] = []
    cursors: dict[str, str] = {}
    more, lost = False, []
    for rank in ranks:
        if oldest is not None and rank not in begin and _written(directory, rank) < oldest:
            continue
        if rank not in begin and lines_max is not None:
            piece = logs.tail(directory, rank, lines=lines_max, bytes_max=share)
        else:
            piece = logs.after(directory, rank, begin.get(rank, ""), bytes_max=share, ended=ended)
        lines += [[rank, line] for line in logs.matching(piece.lines, pattern)]
        cursors[str(rank)] = piece.cursor
        more = more or piece.more
        if piece.lost:
            lost.append(rank)
    return {"lines": lines, "after": cursors, "more": more, "lost": lost}


def _written(directory: Path, rank: int) -> float:
    return max((path.stat().st_mtime for path in logs.files_of(directory, rank)), default=0.0)
