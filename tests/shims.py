"""Launches for tests: short launch files, run to their end or to their death, with nothing left behind."""

import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

from keepstep.agent import shimlink
from keepstep.agent.rank import processes
from keepstep.agent.rank.marker import bearers
from keepstep.agent.shimlink import Ending, LaunchFile, RankLaunch, Shim
from keepstep.agent.standby import StandbyServer
from keepstep.core.errors import Unreachable

_Seen = TypeVar("_Seen")

WITHIN_S = 60.0  # for anything at all, on a machine that does a lot else

ENV = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KEEPSTEP_"))},
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def launch_file(folder: Path, argv: tuple[str, ...], *, ranks: int = 1, **changes: object) -> LaunchFile:
    """One node's launch of `ranks` ranks that run `argv` in `folder`."""
    fields: dict[str, object] = {
        "job": folder.name,
        "attempt": 1,
        "node": "here",
        "world_size": ranks,
        "nodes": 1,
        "node_rank": 0,
        "ranks": tuple(
            RankLaunch(
                rank=rank,
                local_rank=rank,
                slot=rank,
                env={"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
            )
            for rank in range(ranks)
        ),
        "argv": argv,
        "python": True,
        "interpreter": (sys.executable,),
        "cwd": str(folder),
        "env": ENV,
    }
    return LaunchFile(**{**fields, **changes})  # type: ignore[arg-type]


@asynccontextmanager
async def launched(
    directory: Path, file: LaunchFile, *, standby: StandbyServer | None = None, go: bool = True
) -> AsyncIterator[Shim]:
    """A shim, with its ranks told to go; whatever the test does, nothing of it lives afterwards."""
    assert shimlink.claim(directory)
    shim = await shimlink.launch(directory, file, standby=standby, timeout_s=WITHIN_S)
    try:
        prepared = await shim.wait_for(lambda status: status.phase == "prepared", timeout_s=WITHIN_S)
        if go:
            await shim.go("127.0.0.1", prepared.master_port or 1, store=prepared.store)
        yield shim
    finally:
        if processes.read(shim.pid) is not None and shimlink.read_result(directory) is None:
            with suppress(Unreachable):  # it may have ended since
                await shim.end("KILL")
        await shim.ended(timeout_s=WITHIN_S)
        shim.close()
        assert left_of(file.marker) == []


async def run(directory: Path, file: LaunchFile, *, standby: StandbyServer | None = None) -> Ending:
    async with launched(directory, file, standby=standby) as shim:
        return await shim.ended(timeout_s=WITHIN_S)


def said(directory: Path, rank: int = 0) -> str:
    return (directory / f"rank-{rank}.log").read_bytes().decode()


def members(marker: str) -> list[int]:
    """Living processes of an attempt."""
    return [process.pid for process in bearers([marker]) if process.alive]


def left_of(marker: str) -> list[int]:
    """Of a dead attempt: not its shim, which has said so and is just letting go of its memory."""
    return [pid for pid in members(marker) if not _leaves(pid)]


def _leaves(pid: int) -> bool:
    """A shim, or a process that has no memory any more."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
    return not line or bool({b"keepstep-shim", b"shim"} & set(line.split(b"\0")))


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def alive(pid: int) -> bool:
    """A zombie that its new parent has not reaped yet is dead."""
    process = processes.read(pid)
    return process is not None and process.alive


def until(look: Callable[[], _Seen], *, within_s: float = WITHIN_S) -> _Seen:
    """The first true value that `look` returns."""
    deadline_s = time.monotonic() + within_s
    while not (seen := look()):
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.005)
    return seen


def script(folder: Path, text: str, name: str = "script.py") -> tuple[str, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return (name,)
