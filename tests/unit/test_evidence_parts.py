"""What is read of ranks that hang: states of the kernel, stacks, flight recorders, NCCL's RAS."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keepstep.agent import controlserver, kernel, ras, recorder, stacks
from keepstep.core.clock import SystemClock
from keepstep.core.errors import KeepstepError, TimedOut, Unreachable
from shims import until

# ---------------------------------------------------------------- the kernel


def test_the_state_of_a_process() -> None:
    code = "import sys; sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        until(lambda: kernel.standing_of(child.pid).wchan.startswith("read"))
        assert kernel.standing_of(child.pid).process == "blocked"  # on a pipe that nothing comes from
        assert kernel.process_of(child.pid) == "running"  # as the state alone has it
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: kernel.process_of(child.pid) == "stopped")
        assert kernel.standing_of(child.pid).process == "stopped"
        os.kill(child.pid, signal.SIGKILL)
        until(lambda: kernel.process_of(child.pid) == "zombie")
    finally:
        child.kill()
        child.communicate()
    assert kernel.process_of(child.pid) == "gone"


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("0 0x3 0x7f 0x0 0x0 0x0 0x0 0x7ff 0x7f3", "read"),
        ("257 0xffffff9c 0x7f", "openat"),
        ("202 0x7f 0x189", ""),  # futex: waits for another thread
        ("7 0x7f 0x1", ""),  # poll
        ("running", ""),
        ("-1 0x7ff 0x7f3", ""),
        ("", ""),
    ],
)
def test_calls_that_wait_on_a_file(line: str, call: str) -> None:
    assert kernel.call_of(line, "x86_64") == call
    assert kernel.call_of(line, "riscv64") == ""  # numbers that are not known mean nothing


def test_who_traces() -> None:
    assert kernel.tracer_of("Name:\tpython\nTracerPid:\t41\nUid:\t0\n") == 41
    assert kernel.tracer_of("Name:\tpython\nTracerPid:\t0\n") == 0
    assert kernel.tracer_of("") == 0


# ---------------------------------------------------------------- stacks

TRACEBACK = """Current thread 0x00007f822bfff6c0 (most recent call first):
  <no Python frame>

Thread 0x00007f82217fa6c0 (most recent call first):
  File "/a/b.py", line 18 in other

Thread 0x00007f82e95c7b80 (most recent call first):
  File "/a/t, x.py", line 1139 in <lambda>
  File "/a/t.py", line ??? in spin
  File "/a/t.py", line 31 in <module>
"""


def test_a_traceback_is_the_main_threads() -> None:
    assert stacks.of_traceback(TRACEBACK) == (
        "/a/t, x.py:1139 <lambda>", "/a/t.py:??? spin", "/a/t.py:31 <module>"
    )  # fmt: skip
    assert stacks.of_traceback("") == stacks.of_traceback("nonsense\n" * 3) == ()
    deep = TRACEBACK + '  File "/a/t.py", line 31 in <module>\n' * 500
    assert len(stacks.of_traceback(deep)) == stacks.FRAMES_MAX


def test_what_py_spy_writes() -> None:
    frame = {"name": "spin", "filename": "/a/t.py", "line": 3}
    threads = [{"thread_name": "other", "frames": []}, {"thread_name": "MainThread", "frames": [frame] * 2}]
    assert stacks.of_pyspy(json.dumps(threads).encode()) == ("/a/t.py:3 spin",) * 2
    assert stacks.of_pyspy(b"[]") == ()
    for said in (b"", b"{}", b"[1]"):
        with pytest.raises(ValueError):
            stacks.of_pyspy(said)


# ---------------------------------------------------------------- the flight recorder


def entry(group: int, name: str, sequence: int, op: str, **more: Any) -> dict[str, Any]:
    return {
        "pg_id": group, "process_group": [name, "d"], "collective_seq_id": sequence, "profiling_name": op,
        "is_p2p": False, **more,
    }  # fmt: skip


def status(enqueued: int, completed: int) -> dict[str, str]:
    return {"last_enqueued_collective": str(enqueued), "last_completed_collective": str(completed)}


def test_groups_of_a_flight_recorder() -> None:
    trace = {
        "entries": [
            entry(0, "0", 1, "gloo:all_reduce"), entry(0, "0", 2, "gloo:barrier"),
            entry(3, "17", 9, "gloo:broadcast"), entry(3, "17", 9, "gloo:send", is_p2p=True),
        ],
        "pg_status": {"0": status(2, 1), "3": status(8, 8), "4": status(-1, -1)},
        "pg_config": {"0": {"name": "0", "ranks": "[0, 1]"}, "": {"name": "", "ranks": "[0]"}},
    }  # fmt: skip
    assert recorder.groups_of(trace, {"17": [4, 5]}) == [
        {"name": "0", "ranks": [0, 1], "enqueued": 2, "completed": 1, "op": "gloo:barrier"},
        {"name": "17", "ranks": [4, 5], "enqueued": 9, "completed": 8, "op": "gloo:broadcast"},
        {"name": "4", "ranks": [], "enqueued": -1, "completed": -1, "op": ""},
    ]
    assert recorder.groups_of({}, {}) == []


def test_members_as_the_hook_notes_them() -> None:
    lines = [
        {"name": "0", "ranks": [0, 1], "whole": False}, {"name": "0", "ranks": [0, 3], "whole": True},
        {"name": "7", "ranks": [1, 5], "whole": False},
    ]  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"name": "8", "ra'
    assert recorder.members_of(text) == {"0": [0, 1, 2, 3], "7": [1, 5]}


# ---------------------------------------------------------------- the control server


def served(path: Path, answer: bytes | None, ask: Callable[[], Any]) -> Any:
    """A server that says `answer` to whatever is asked; None: nothing."""

    async def play() -> Any:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            if answer is None:
                await reader.read()  # until the other side goes
            else:
                writer.write(answer)
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_unix_server(talk, path):
            return await ask()

    return asyncio.run(play())


def test_a_control_server(tmp_path: Path) -> None:
    socket = tmp_path / "c.sock"

    def ask(within_s: float = 20.0) -> Any:
        return controlserver.ask(socket, "ping", within_s=within_s)

    with pytest.raises(Unreachable):
        asyncio.run(ask())
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npong"
    assert served(socket, ok, ask) == b"pong"
    for refusal in (b"HTTP/1.1 404 Not Found\r\n\r\nno", b""):
        with pytest.raises(Unreachable):
            served(socket, refusal, ask)
    with pytest.raises(TimedOut):
        served(socket, None, lambda: ask(0.1))


# ---------------------------------------------------------------- NCCL's RAS


def communicator(
    *counts: int, missing: tuple[dict[str, Any], ...] = (), **status_of_0: Any
) -> dict[str, Any]:
    ranks = [
        {"rank": rank, "host": "h", "pid": 100 + rank, "collective_counts": {"AllReduce": n, "Broadcast": 1}}
        for rank, n in enumerate(counts)
    ]
    ranks[0]["status"] = status_of_0
    return {"hash": "0xab", "size": 4, "ranks": ranks, "missing_ranks": list(missing)}


def test_findings_of_ras() -> None:
    gone = {"rank": 3, "host": "h", "pid": 103, "status": {"unresponsive": True, "considered_dead": False}}
    found = ras.findings({"communicators": [communicator(9, 7, 9, missing=(gone,), async_error=6)]})
    who = {"communicator": "0xab", "host": "h"}
    assert found == {
        "missing": [{**who, "rank": 3, "pid": 103, "state": "unresponsive"}],
        "behind": [{**who, "rank": 1, "pid": 101, "by": {"AllReduce": 2}}],
        "failed": [{**who, "rank": 0, "pid": 100, "async_error": 6}],
    }
    assert ras.findings({"communicators": []}) == {"missing": [], "behind": [], "failed": []}
    idle = communicator(0, 0)
    for rank in idle["ranks"]:
        rank["collective_counts"] = {"AllReduce": 0}
    with pytest.raises(ValueError, match="without any counts"):
        ras.findings({"communicators": [idle]})


def test_the_version_comes_from_the_wheel() -> None:
    maps = "7f00-7f01 r-xp 00000000 08:01 12  /env/lib/site-packages/nvidia/nccl/lib/libnccl.so.2\n"
    beside = ["torch-2.15.0.dist-info", "nvidia_nccl_cu13-2.30.7.dist-info", "nvidia_cublas-13.dist-info"]
    assert ras.version_in(maps, beside) == (2, 30, 7) > ras.SINCE
    assert ras.version_in(maps, ["nvidia_nccl_cu12-2.29.1.dist-info"]) < ras.SINCE
    assert ras.version_in(maps, []) == ras.version_in("7f00 /usr/lib/libc.so.6\n", beside) == ()


@pytest.mark.parametrize("old", [False, True])
def test_the_protocol_of_ras(old: bool) -> None:
    """Against a server that speaks the lines of NCCL 2.30; an older one knows no formats."""
    report = json.dumps({"communicators": [communicator(2, 1)]})
    heard: list[str] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers = {
            "CLIENT": "SERVER PROTOCOL 2\n",
            "TIMEOUT": "OK\n",
            "SET": "ERROR: Unknown\n" if old else "OK\n",
        }
        while line := (await reader.readline()).decode():
            heard.append(line.strip())
            writer.write(answers.get(line.split()[0], report).encode())
            if line.startswith("STATUS"):
                break
        writer.close()
        await writer.wait_closed()

    async def play() -> bytes:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        async with server:
            return await ras.status("127.0.0.1", server.sockets[0].getsockname()[1], within_s=20.0)

    if old:
        with pytest.raises(Unreachable, match="SET FORMAT"):
            asyncio.run(play())
        return
    assert ras.findings(json.loads(asyncio.run(play())))["behind"][0]["rank"] == 1
    assert heard == ["CLIENT PROTOCOL 2", "TIMEOUT 20", "SET FORMAT json", "STATUS"]


def test_ras_is_not_asked_where_it_might_do_harm(tmp_path: Path) -> None:
    def ask(pid: int) -> str:
        return str(asyncio.run(ras.ask(tmp_path, [pid], SystemClock(), within_s=5.0))["error"])

    without = subprocess.Popen(["sleep", "60"])  # this process may have loaded NCCL for another test
    try:
        assert "not used here" in ask(without.pid)
        ras.reserve(tmp_path)
        assert "just now" in ask(without.pid)
        os.utime(tmp_path / ras.FILE, (1, 1))
        assert "unknown version" in ask(without.pid)
    finally:
        without.kill()
        without.wait()
    assert issubclass(Unreachable, KeepstepError)
