"""Ranks for tests, forked from the test's own process, which has torch imported already.

A cold import costs seconds a rank on a small machine; a fork costs milliseconds. Fork is safe only from one
thread, so the number of OpenMP threads is set before torch comes in.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import importlib
import pickle
import select
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

T = TypeVar("T")
torch.set_num_threads(1)
# The thread that watches progress bars (of transformers, of datasets) would outlive the test that drew one.
importlib.import_module("tqdm").tqdm.monitor_interval = 0


def run(
    world_size: int, work: Callable[[int], T], *, deadline_s: float = 60, may_die: bool = False
) -> list[T | None]:
    """`work(rank)` on every rank of a gloo world; what each returned, by rank.

    An exception on any rank fails the test with that rank's traceback. With `may_die`, None stands for a rank
    that was killed. Ranks left at the deadline are killed and fail the test.
    """
    # What another thread of Python holds would stay locked in a fork. OpenBLAS sees to its own.
    assert threading.active_count() == 1, threading.enumerate()
    with tempfile.TemporaryDirectory() as folder:
        pipes: dict[int, int] = {}
        pids: list[int] = []
        for rank in range(world_size):
            ours, theirs = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(ours)
                _be(rank, world_size, work, f"{folder}/store", theirs)
            os.close(theirs)
            pids.append(pid)
            pipes[ours] = rank
        try:
            answers = _collect(pipes, time.monotonic() + deadline_s)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    results: list[T | None] = []
    for rank in range(world_size):
        if not answers[rank]:
            assert may_die, f"rank {rank} died"
            results.append(None)
            continue
        error, value = pickle.loads(answers[rank])  # noqa: S301 - of our own child
        assert not error, f"rank {rank}:\n{error}"
        results.append(value)
    return results


def _be(rank: int, world_size: int, work: Callable[[int], Any], store: str, answer: int) -> None:
    """The child: never returns into pytest."""
    os.setpgid(0, 0)  # a signal for the terminal is pytest's alone
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo",
                store=FileStore(store, world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=30),
            )
        said = pickle.dumps(("", work(rank)))
        if world_size > 1:
            dist.barrier()
    except BaseException:  # noqa: BLE001 - the process's outermost frame
        said = pickle.dumps((traceback.format_exc(), None))
    with os.fdopen(answer, "wb") as pipe:
        pipe.write(said)
    os._exit(0)


def _collect(pipes: dict[int, int], until: float) -> dict[int, bytes]:
    answers = dict.fromkeys(pipes.values(), b"")
    pending = set(pipes)
    while pending:
        ready, _, _ = select.select(list(pending), [], [], max(0.0, until - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            if part := os.read(pipe, 1 << 16):
                answers[pipes[pipe]] += part
            else:
                pending.remove(pipe)
    late = sorted(pipes[pipe] for pipe in pending)
    for pipe in pipes:
        os.close(pipe)
    assert not late, f"ranks {late} did not end in time"
    return answers
