"""Which files a process is just writing."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.agent.unfinished import let_finish, writing
from keepstep.core.clock import SystemClock

WRITER = """
import os, sys
held = [open(sys.argv[1], "w"), open("/dev/null", "w"), open(sys.argv[2])]
held.append(os.fdopen(os.memfd_create("page"), "wb"))
print("open", flush=True)
sys.stdin.readline()
held[0].close()
print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "read").touch()
    command = [sys.executable, "-c", WRITER, str(tmp_path / "written"), str(tmp_path / "read")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdin
    assert process.stdout.readline() == "open\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_only_regular_files_that_are_written_count(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    assert writing(writer.pid) == [str(tmp_path / "written")]
    assert writer.stdin
    assert writer.stdout
    writer.stdin.write("\n")
    writer.stdin.flush()
    assert writer.stdout.readline() == "closed\n"
    assert writing(writer.pid) == []


def test_waiting_ends_with_the_file_or_at_its_bound(writer: subprocess.Popen[str]) -> None:
    clock = SystemClock()
    began = clock.monotonic()
    asyncio.run(let_finish([writer.pid], clock, within_s=0.3))
    assert clock.monotonic() - began >= 0.3
    assert writer.stdin
    writer.stdin.write("\n")
    writer.stdin.flush()
    asyncio.run(let_finish([writer.pid], clock, within_s=60))
    assert writing(writer.pid) == []


def test_a_process_that_is_gone_writes_nothing() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert writing(process.pid) == []
