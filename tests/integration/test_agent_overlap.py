"""What an agent does of its own accord so that no two attempts overlap: sentences of the design, attacked.

The ranks are scripts that write their own checkpoints: nothing but their end keeps them from writing.
"""

import asyncio
import time
from pathlib import Path

from agents import JOB, controlled, launch_of, lives, until
from keepstep.core import checkpoints
from keepstep.core.ids import Attempt
from keepstep.wire import messages as wire

STEPPING = """
import time
from keepstep.session import current
session = current()
for step in range(1, 100000):
    session.step_done(step)
    time.sleep(0.05)
"""

# Writes a file bit by bit from the moment it is asked to end; a second rank never closes the one it has.
WRITING = """
import os, sys, time
rank = os.environ["RANK"]
with open("file-" + rank + ".part", "w") as file:
    file.write("begun ")
    file.flush()
    open("writing-" + rank, "w").close()
    while not os.path.exists("finish-" + rank):
        time.sleep(0.01)
    file.write("whole")
os.rename("file-" + rank + ".part", "file-" + rank)
time.sleep(600)
"""


def test_a_file_that_is_being_written_is_finished(tmp_path: Path) -> None:
    """A surviving rank of a script that has a regular file open for writing gets time to finish it."""

    async def play() -> None:
        async with controlled(tmp_path) as (controller, _):
            work = tmp_path / "work"
            launch = launch_of(work, WRITING, ranks=1)
            pid = (await controller.started(launch)).ranks[0].pid
            await until((work / "writing-0").exists)
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1, finish_s=60.0),))
            seen = len(controller.states)
            await until(lambda: len(controller.states) > seen + 2)
            assert lives(pid)  # the order has come by now, and the file is open
            (work / "finish-0").touch()
            await controller.phase("dead")
            assert (work / "file-0").read_text() == "begun whole"

    asyncio.run(play())


def test_a_file_that_is_never_finished_delays_the_end_by_its_bound_only(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, _):
            work = tmp_path / "work"
            launch = launch_of(work, WRITING)
            pids = [rank.pid for rank in (await controller.started(launch)).ranks]
            await until(lambda: all((work / f"writing-{rank}").exists() for rank in (0, 1)))
            began = time.monotonic()
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1, finish_s=1.0),))
            (work / "finish-0").touch()
            await controller.phase("dead")
            assert time.monotonic() - began >= 1.0
            assert not any(lives(pid) for pid in pids)
            assert not (work / "file-1").exists()

    asyncio.run(play())


def test_an_orphaned_gang_renews_its_lease_until_it_was_replaced(tmp_path: Path) -> None:
    """An agent whose ranks step renews the lease while the checkpoint folder still names its attempt."""

    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            folder = tmp_path / "checkpoints"
            launch = launch_of(
                tmp_path / "work", STEPPING, ranks=1, checkpoint={"dir": str(folder)}, orphan_lease_s=1.0
            )
            pid = (await controller.started(launch)).ranks[0].pid
            assert checkpoints.read_fence(folder) == 1
            await controller.close()
            await until(lambda: agent.said().count("goes on: no controller") >= 2)
            assert lives(pid)
            checkpoints.raise_fence(folder, Attempt(2))
            await until(lambda: not lives(pid))
            await until(lambda: "was replaced" in agent.said())

    asyncio.run(play())


def test_without_a_folder_that_names_it_an_orphaned_gang_ends_with_its_lease(tmp_path: Path) -> None:
    """Also one that steps: the controller starts it elsewhere once the lease has run out."""

    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            launch = launch_of(tmp_path / "work", STEPPING, ranks=1, orphan_lease_s=1.0)
            pid = (await controller.started(launch)).ranks[0].pid
            await controller.close()
            await until(lambda: not lives(pid))
            assert "nothing says that it is still wanted" in agent.said()

    asyncio.run(play())
