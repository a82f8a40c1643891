"""Evidence on ranks that hang, each in its own way: asked through a real agent, of real gloo ranks."""

import asyncio
import ctypes
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agents import JOB, Controller, controlled, launch_of, until
from hooked import LOAD_S
from keepstep.wire.messages import RankStatus, Stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # torch is loaded, beside whatever else is done

# Every rank is told what to do by a file of its own, which it looks for between two steps.
HANGING = """
import ctypes, os, pathlib, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
group = dist.new_group([0, 1])
x = torch.ones(1)
def step():
    dist.all_reduce(x, group=group)
def endless():
    while True: pass
def holding():
    ctypes.PyDLL(None).pause()
def fifo():
    open("fifo", "rb").read()
def mismatched():
    dist.all_gather([torch.ones(1), torch.ones(1)], x, group=group)
def done():
    raise SystemExit
for number in range(10**9):
    told = pathlib.Path(f"rank-{rank}-at-{number}")
    while not told.exists():
        time.sleep(0.005)
    print(number, flush=True)
    globals()[told.read_text()]()
"""

Play = Callable[["Gang"], Awaitable[None]]


class Gang:
    """Two ranks that do what they are told, a thing at a time."""

    def __init__(self, controller: Controller, folder: Path, attempt: int) -> None:
        self.controller, self.folder, self.attempt = controller, folder, attempt
        self._told = [0, 0]

    def tell(self, rank: int, what: str) -> None:
        new = self.folder / f"new-{rank}"
        new.write_text(what)
        new.rename(self.folder / f"rank-{rank}-at-{self._told[rank]}")
        self._told[rank] += 1

    def both(self, what: str) -> None:
        for rank in (0, 1):
            self.tell(rank, what)

    async def evidence(self, **params: Any) -> list[dict[str, Any]]:
        answer = await self.controller.ask("evidence", job=JOB, attempt=self.attempt, **params)
        assert answer.error == ""
        ranks: list[dict[str, Any]] = answer.data["ranks"]
        assert [one["rank"] for one in ranks] == [0, 1]
        return ranks

    async def until(self, rank: int, seen: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
        """Ask until the evidence on a rank is as it should be; that evidence on all."""
        deadline_s = asyncio.get_running_loop().time() + LOAD_S
        while not seen((found := await self.evidence())[rank]):
            assert asyncio.get_running_loop().time() < deadline_s, found
        return found

    def status(self, rank: int) -> RankStatus:
        status = self.controller.attempt(self.attempt)
        assert status is not None
        return status.ranks[rank]

    def pid(self, rank: int) -> int:
        return self.status(rank).pid

    def group(self, one: dict[str, Any]) -> dict[str, Any]:
        """The subgroup that both are in: the default one is named 0."""
        found: dict[str, Any] = next(group for group in one["groups"] if group["name"] != "0")
        return found


async def stopped(gang: Gang) -> None:
    gang.tell(0, "step")
    os.kill(gang.pid(1), signal.SIGSTOP)
    zero, one = await gang.until(1, lambda one: one["process"] == "stopped" and one["stack"])
    assert (one["interpreter"], one["groups"]) == ("unknown", [])
    assert any("script.py" in frame for frame in one["stack"])
    assert zero["process"] == "running"
    await until(lambda: gang.status(1).process == "stopped")
    os.kill(gang.pid(1), signal.SIGCONT)
    gang.tell(1, "step")


async def behind(gang: Gang) -> None:
    """One waits in a collective that the other has not begun: in an endless loop, both can still be asked."""
    before = gang.group((await gang.evidence())[0])["enqueued"]
    gang.tell(0, "step")
    gang.tell(1, "endless")
    await gang.until(1, lambda one: any("endless" in frame for frame in one["stack"]))
    zero, one = await gang.until(0, lambda zero: gang.group(zero)["enqueued"] > before)
    assert (one["process"], one["interpreter"], one["error"]) == ("running", "answers", "")
    assert "endless" in one["stack"][0]
    ahead, late = gang.group(zero), gang.group(one)
    assert (ahead["ranks"], ahead["op"]) == ([0, 1], "gloo:all_reduce")
    assert (ahead["enqueued"], ahead["completed"]) == (late["enqueued"] + 1, late["completed"])
    assert any("step" in frame for frame in zero["stack"]) and zero["interpreter"] == "answers"


async def holding(gang: Gang) -> None:
    """In an endless call of C that keeps the interpreter's lock: the server's threads still answer."""
    gang.tell(1, "holding")
    _, one = await gang.until(1, lambda one: one["interpreter"] == "stuck")
    assert gang.group(one)["ranks"] == [0, 1]
    assert any("holding" in frame for frame in one["stack"]), one  # by py-spy


async def blocked(gang: Gang) -> None:
    """In the kernel, in a read that nothing comes from."""
    os.mkfifo(gang.folder / "fifo")
    gang.tell(1, "fifo")
    _, one = await gang.until(1, lambda one: one["process"] == "blocked")
    assert "open" in one["wchan"]
    assert one["interpreter"] == "answers" and any("fifo" in frame for frame in one["stack"])
    writing = os.open(gang.folder / "fifo", os.O_WRONLY)
    _, one = await gang.until(1, lambda one: one["wchan"].startswith("read"))
    assert one["process"] == "blocked"
    os.close(writing)


async def traced(gang: Gang) -> None:
    """Under a debugger, here this process: its thread attaches, looks, and lets go."""
    pid, library = gang.pid(1), ctypes.CDLL(None, use_errno=True)
    attach, detach = 16, 17
    assert library.ptrace(attach, pid, 0, 0) == 0, os.strerror(ctypes.get_errno())
    try:
        os.waitpid(pid, 0x40000000)  # noqa: ASYNC222 - __WALL: of any process, stopped at once
        _, one = await gang.until(1, lambda one: one["process"] == "traced")
        assert one["interpreter"] == "unknown"
        await until(lambda: gang.status(1).process == "traced")
    finally:
        assert library.ptrace(detach, pid, 0, 0) == 0


async def mismatched(gang: Gang) -> None:
    gang.tell(0, "step")
    gang.tell(1, "mismatched")
    await gang.until(0, lambda zero: gang.group(zero)["enqueued"] > gang.group(zero)["completed"])
    zero, one = await gang.until(1, lambda one: gang.group(one)["enqueued"] > gang.group(one)["completed"])
    assert gang.group(zero)["enqueued"] == gang.group(one)["enqueued"]
    assert (gang.group(zero)["op"], gang.group(one)["op"]) == ("gloo:all_reduce", "gloo:all_gather")


async def killed(gang: Gang) -> None:
    gang.tell(0, "step")
    await gang.until(0, lambda zero: any("step" in frame for frame in zero["stack"]))
    os.kill(gang.pid(1), signal.SIGKILL)


def test_each_hang_is_told_from_the_others(tmp_path: Path) -> None:
    """One agent and one loaded standby server for all; a gang of its own for each that cannot go on."""

    async def play() -> None:
        async with controlled(tmp_path) as (controller, _):
            for number, parts in enumerate(
                ([stopped, blocked, traced, behind], [holding], [mismatched], [killed]), start=1
            ):
                await _gang(controller, tmp_path / f"work-{number}", number, parts)

    asyncio.run(play())


async def _gang(controller: Controller, folder: Path, number: int, parts: Sequence[Play]) -> None:
    launch = launch_of(folder, HANGING, attempt=number, run={"warm": "auto"})
    await controller.want(launch)
    await until(lambda: (s := controller.attempt(number)) and s.phase == "prepared", within_s=LOAD_S)
    await controller.started(launch)
    gang = Gang(controller, folder, number)
    gang.both("step")
    await gang.until(0, lambda zero: zero["groups"])
    for part in parts:
        await part(gang)
    await controller.want(stops=(Stop(job=JOB, attempt=number),))
    await controller.phase("dead", number)
    assert list((controller.endpoint.parent).glob("agent-a/jobs/*/*/control-*.sock")) == []
