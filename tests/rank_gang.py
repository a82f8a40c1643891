"""Gangs of trainer ranks for tests and benches: forked from this process, the store in a process of its own.

A rank is a function of the environment's making: it gets RANK and the like, runs, and hands back one value
as JSON through a pipe. This process must have one thread (OMP_NUM_THREADS=1 before torch is imported), no
process group and no store server; then forking it is safe and a gang stands within half a second.
"""

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

Rank = Callable[[], Any]


class GangFailed(AssertionError):
    pass


def run_gang(world_size: int, rank: Rank, *, deadline_s: float = 60.0) -> list[Any]:
    """What `rank()` returned on each rank, in order. Ends every process it started, whatever happens."""
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not be forked"
    gc.collect()
    gc.freeze()
    try:
        with _store() as port:
            return _run(world_size, rank, port, deadline_s)
    finally:
        gc.unfreeze()


def _run(world_size: int, rank: Rank, port: int, deadline_s: float) -> list[Any]:
    pids: dict[int, int] = {}
    pipes: dict[int, int] = {}
    try:
        for number in range(world_size):
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                _be(number, world_size, port, rank, writing)
            os.close(writing)
            pids[number], pipes[number] = pid, reading
        return _collect(pipes, deadline_s)
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
        for pid in pids.values():
            os.waitpid(pid, 0)
        for pipe in pipes.values():
            os.close(pipe)


def _collect(pipes: dict[int, int], deadline_s: float) -> list[Any]:
    end = time.monotonic() + deadline_s
    parts: dict[int, bytes] = dict.fromkeys(pipes, b"")
    with DefaultSelector() as selector:
        for number, pipe in pipes.items():
            selector.register(pipe, EVENT_READ, number)
        while selector.get_map():
            ready = selector.select(end - time.monotonic())
            if not ready and time.monotonic() >= end:
                raise GangFailed(f"ranks {[k.data for k in selector.get_map().values()]} gave no answer")
            for key, _ in ready:
                if chunk := os.read(key.fd, 1 << 20):
                    parts[key.data] += chunk
                    continue
                selector.unregister(key.fd)
    answers = [json.loads(parts[number] or '{"failed": "died silently"}') for number in sorted(parts)]
    failed = [f"rank {k}: {one['failed']}" for k, one in enumerate(answers) if "failed" in one]
    if failed:
        raise GangFailed("\n".join(failed))
    return [one["answer"] for one in answers]


def _be(number: int, world_size: int, port: int, rank: Rank, pipe: int) -> None:
    """In the forked child; never returns."""
    code = 1
    try:
        os.environ.update(
            RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        try:
            answer = {"answer": rank()}
        except BaseException:  # noqa: BLE001 - told to the parent
            answer = {"failed": traceback.format_exc()}
        with os.fdopen(pipe, "w") as out:
            json.dump(answer, out)
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


@contextmanager
def _store() -> Iterator[int]:
    """A rendezvous store in a process of its own, on a socket that listens before anybody asks."""
    from torch._C._distributed_c10d import TCPStore

    with socket.socket(socket.AF_INET) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        port: int = listening.getsockname()[1]
        pid = os.fork()
        if pid == 0:
            try:
                _kept = TCPStore(
                    "127.0.0.1", port, None, True, wait_for_workers=False,
                    master_listen_fd=os.dup(listening.fileno()),
                )  # fmt: skip
                while True:
                    signal.pause()
            finally:
                os._exit(1)
    try:
        yield port
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
