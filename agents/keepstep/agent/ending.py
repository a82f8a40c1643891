"""How an attempt ended on this node, and making sure that it has.

A shim that ends by itself has killed everything and says so in its result. A shim that was killed takes
its ranks with it, but what had left them lives on: it is found by the marker in its environment, killed
here, and what it had in /dev/shm is removed. An `Ending` is only given out when nothing of the attempt
lives.
"""

import asyncio
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from keepstep.agent.rank import processes
from keepstep.agent.rank.kill import Purge
from keepstep.agent.rank.marker import bearers
from keepstep.agent.rank.protocol import LOG, RESULT, RankState, ShimStatus
from keepstep.core.errors import TimedOut

_ROUND_S = 0.02  # between two rounds of killing


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended on this node; nothing of it is alive."""

    ranks: tuple[RankState, ...]
    shim_died: bool = False  # killed before it could write its result
    swept: int = 0  # processes that the agent had to kill itself
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Swept:
    killed: int
    left: int  # alive at the deadline
    files: int  # unlinked in /dev/shm


async def sweep(marker: str, *, timeout_s: float = 30.0) -> Swept:
    """Kill every process of an attempt whose shim is dead."""
    purge = Purge()
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while True:
        left = await asyncio.to_thread(lambda: purge.round(processes_of(marker)))
        if left == 0 or loop.time() > deadline_s:
            break
        await asyncio.sleep(_ROUND_S)
    files = await asyncio.to_thread(purge.tidy) if left == 0 else []
    return Swept(killed=purge.killed, left=left, files=len(files))


def read_result(directory: Path) -> Ending | None:
    try:
        raw = json.loads((directory / RESULT).read_bytes())
    except FileNotFoundError:
        return None
    status = msgspec.convert(raw["status"], ShimStatus)
    return Ending(ranks=status.ranks, swept=int(raw["killed"]))


async def died(directory: Path, marker: str, ranks: Iterable[RankState]) -> Ending:
    swept = await sweep(marker)
    if swept.left:
        raise TimedOut(
            f"{swept.left} processes of {marker} cannot be killed", where=str(directory),
            why="They wait in the kernel, most often for a file system or a device.",
            next="Look at their state with ps; the node may need a restart.",
        )  # fmt: skip
    lost = (
        replace(rank, state="lost") if rank.state in ("waiting", "running") else rank for rank in ranks
    )  # fmt: skip
    reason = last_words(directory) or "the shim was killed"
    return Ending(ranks=tuple(lost), shim_died=True, swept=swept.killed, reason=reason)


def processes_of(marker: str) -> list[processes.Process]:
    return [process for process in bearers([marker], {os.getpid()}) if process.alive]


def last_words(directory: Path) -> str:
    with suppress(OSError):
        said = (directory / LOG).read_text(errors="replace").strip().splitlines()
        return said[-1] if said else ""
    return ""
