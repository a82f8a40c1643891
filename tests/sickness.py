"""Makes a device sick in tests: what it computes, keeps or sends is wrong, late, or never comes.

SICKNESS says WHO:HOW:WHAT[:FIRST], for a rank's number or a node's name, one of `HOW`, and an operator of
PyTorch (aten.mm, c10d.allreduce_) from its FIRST call on. Every call of that operator in the process goes
through here, whoever makes it, so the code under test is unchanged and knows nothing of it.
"""

import os
import signal
import threading
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HOW = ("wrong", "slow", "hangs", "fails", "dies", "refuses")
_TIMES = 20  # slower


class Sickness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, how: str, what: str, first: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert how in HOW, how
        self._how, self._what, self._first, self._calls = how, what, first, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).rpartition(".")[0] != self._what:
            return func(*args, **(kwargs or {}))
        self._calls += 1
        if self._calls < self._first:
            return func(*args, **(kwargs or {}))
        if self._how == "hangs":
            threading.Event().wait()
        if self._how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._how == "fails":
            raise RuntimeError("the device has fallen off the bus")
        if self._how == "refuses":  # as PyTorch does on a GPU whose library adds in any order
            torch.use_deterministic_algorithms(True)
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        started = time.perf_counter()
        answer = func(*args, **(kwargs or {}))
        if self._how == "slow":
            until = time.perf_counter() + _TIMES * (time.perf_counter() - started)
            while time.perf_counter() < until:
                sum(range(1000))
        else:
            flip(answer, self._calls % 8)
        return answer


def flip(answer: Any, bit: int) -> None:
    """One bit of the first tensor in it: not always the same one, or two wrongs could make a right."""
    while isinstance(answer, tuple | list):
        answer = answer[0]
    answer.view(-1).view(torch.uint8)[3] ^= 1 << bit


def fall_sick() -> None:
    """If SICKNESS means this process. It stays so to its end."""
    who, how, what, *first = os.environ["SICKNESS"].split(":")
    node = os.environ.get("KEEPSTEP_ATTEMPT", "").rpartition("/")[2]
    if who in (os.environ.get("RANK"), node):
        Sickness(how, what, int(first[0]) if first else 1).__enter__()  # type: ignore[no-untyped-call]
