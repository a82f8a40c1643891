"""Makes one rank of the built-in trainer fail: DISTURB says KIND:RANK:STEP, with commas one for each attempt.

On PYTHONPATH of a job under test. The trainer itself is unchanged: its class is wrapped when it is imported.
With the kind `asked` a rank is held up as DISTURB_FOLDER/asked says at each step: `data`, `gc`, or nothing.
"""

import gc
import importlib.machinery
import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

TRAINER = "keepstep.llama.trainer"
FLIPPED = {"flip weights": "weights", "flip owned": "master", "flip moment": "exp_avg"}  # of its state


def disturb(trainer: Any, kind: str) -> None:
    """In the middle of a step, in its forward phase."""
    from keepstep.session import Phase

    if kind != "asked":
        trainer.session.phase(Phase.EVALUATION if kind == "evaluate" else Phase.FORWARD)
    match kind:
        case "loop":
            while True:
                sum(range(1000))
        case "fifo":
            name = Path(os.environ["DISTURB_FOLDER"]) / "fifo"
            os.mkfifo(name)
            name.read_bytes()  # nobody ever writes
        case "evaluate":
            threading.Event().wait(float(os.environ["DISTURB_SECONDS"]))
        case "exit":
            os._exit(0)
        case "mismatch":
            import torch.distributed as dist

            trainer.session.wait("world")
            dist.barrier(trainer.groups.world)  # the others come to another collective
        case "lock":
            re.match("(a+)+$", "a" * 64 + "b")  # for centuries, and never gives the interpreter back
        case "asked":
            hold_up(trainer, Path(os.environ["DISTURB_FOLDER"]) / "asked")
        case "slow":
            until = time.perf_counter() + float(os.environ["DISTURB_SECONDS"])
            while time.perf_counter() < until:
                sum(range(1000))
        case "nan":
            spoil(trainer)
        case "flip weights" | "flip owned" | "flip moment":
            flip(getattr(trainer.state, FLIPPED[kind]))


def flip(part: Any) -> None:
    """One bit of one word."""
    import torch

    part.view(torch.int32)[11] ^= 1 << 20


def hold_up(trainer: Any, asked: Path) -> None:
    """Its data comes late, or it collects the garbage of a crowd of objects at each step."""
    match asked.read_text() if asked.exists() else "":
        case "data":
            source = trainer.source

            class Late:
                def sequences(self, *arguments: int) -> Any:
                    trainer.source = source
                    time.sleep(0.08)
                    return source.sequences(*arguments)

            trainer.source = Late()
        case "gc":
            crowd = [[k] for k in range(400_000)]
            gc.collect()
            crowd.clear()


def spoil(trainer: Any) -> None:
    """This rank's next gradient is not a number, once."""
    gradients = trainer.optimizer.gradients
    collect = gradients.collect

    def spoilt(replica: int) -> None:
        gradients.collect = collect
        trainer.state.grads[0] = float("nan")
        collect(replica)

    gradients.collect = spoilt


def wrap(step: Callable[..., Any]) -> Callable[..., Any]:
    faults = [fault.split(":") for fault in os.environ["DISTURB"].split(",")]

    def faulty(self: Any, *arguments: Any, **named: Any) -> Any:
        attempt = int(os.environ.get("KEEPSTEP_ATTEMPT", "/1/").split("/")[1])
        kind, rank, at = faults[min(attempt, len(faults)) - 1]
        due = attempt <= len(faults) or kind == "nan"
        reached = self.state.step >= int(at) if kind in ("slow", "asked") else self.state.step == int(at)
        if os.environ.get("RANK") == rank and due and reached:
            disturb(self, kind)
        return step(self, *arguments, **named)

    return faulty


class Finder:
    """Lets the trainer's module be found as usual, and wraps what it defines."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            module.Trainer.step = wrap(module.Trainer.step)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "DISTURB" in os.environ:
    sys.meta_path.insert(0, Finder())
