"""Two gangs that train in turn, for benches: on a machine that is shared, both get the same of it.

Each gang is a process with its ranks below it. It says a line when it stands; then each line on its input has
its ranks make one burst of steps, and a line on its output says how long a step took.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch.distributed as dist

BURSTS, STEPS = 10, 4  # the first burst warms up


def train_in_turn(step: Callable[[], object]) -> None:
    """On every rank of a gang, in a process group of all."""
    if dist.get_rank() == 0:
        os.write(1, b"stands\n")
    for _ in range(BURSTS):
        if dist.get_rank() == 0 and not os.read(0, 1):
            raise EOFError("who asks for bursts is gone")
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        dist.barrier()
        if dist.get_rank() == 0:
            os.write(1, f"{(time.perf_counter() - begun) / STEPS}\n".encode())


def step_seconds(commands: Sequence[Sequence[str]], environment: dict[str, str]) -> list[list[float]]:
    """Of each gang, by burst. What a gang says when it fails goes to stderr."""
    with ExitStack() as stack:
        gangs = [stack.enter_context(_gang(command, environment)) for command in commands]
        found: list[list[float]] = [[] for _ in gangs]
        for _ in range(BURSTS):
            for gang, times in zip(gangs, found, strict=True):
                assert gang.stdin is not None
                gang.stdin.write(b"\n")
                times.append(float(_line(gang)))
    return [times[1:] for times in found]


@contextmanager
def _gang(command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Once it stands, so that no rank waits for another gang's imports. It ends itself, with its ranks."""
    gang = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=os.environ | environment
    )
    assert gang.stdin is not None
    try:
        _line(gang)
        yield gang
    finally:
        gang.stdin.close()
        gang.wait()


def _line(gang: subprocess.Popen[bytes]) -> bytes:
    assert gang.stdout is not None
    if not (line := gang.stdout.readline()):
        raise RuntimeError(f"{gang.args!r} ended")
    return line
