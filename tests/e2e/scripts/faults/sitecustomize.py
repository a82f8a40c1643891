"""Makes a rank of the built-in trainer fail: DISTURB says KIND:RANK:STEP, with commas one for each attempt;
RANK may be `all`.

On PYTHONPATH of a job under test. The trainer itself is unchanged: its class is wrapped when it is imported.
With the kind `asked` a rank is held up as DISTURB_FOLDER/asked says at each step: `data`, `gc`, or nothing.
With `zeros` three batches come from a file that lost its content, in every attempt; in those that
DISTURB names the next one does not come at all.

SICKNESS does the same to the devices of validations: see tests/sickness.py, which must be in reach.
"""

import gc
import importlib.machinery
import importlib.util
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROTTEN = 3  # batches
FLIPPED = {"flip weights": "weights", "flip owned": "master", "flip moment": "exp_avg"}  # of its state


def disturb(trainer: Any, kind: str) -> None:
    """In the middle of a step, in its forward phase."""
    from keepstep.session import Phase

    if kind not in ("asked", "zeros"):
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
        case _:
            falsify(trainer, kind)


def falsify(trainer: Any, kind: str) -> None:
    """What it computes with is not what it should be."""
    match kind:
        case "nan":
            spoil(trainer)
        case "zeros":
            next_batch(trainer, lambda batch: batch._replace(tokens=batch.tokens * 0))
        case "zeros end":
            next_batch(trainer, lambda _: threading.Event().wait())
        case "flip weights" | "flip owned" | "flip moment":
            flip(getattr(trainer.state, FLIPPED[kind]))
        case "flip received":
            receive_wrongly(trainer)
        case "flip kept":
            slots = trainer.kept.slots
            newest = max(stamp for stamp in slots._stamps if stamp is not None)
            slots.payload(slots._stamps.index(newest))[12345] ^= 1
            os.kill(os.getpid(), signal.SIGKILL)


def flip(part: Any) -> None:
    """One bit of one word."""
    import torch

    part.view(torch.int32)[11] ^= 1 << 20


def receive_wrongly(trainer: Any) -> None:
    """Of the next update: what was gathered is not what its owners have sent."""
    seal = trainer.parity.seal

    def late() -> None:
        trainer.parity.seal = seal
        flip(trainer.state.weights)
        seal()

    trainer.parity.seal = late


def next_batch(trainer: Any, change: Callable[[Any], Any]) -> None:
    """It goes through `change`."""
    source = trainer.source

    class Changed:
        def sequences(self, *arguments: int) -> Any:
            trainer.source = source
            return change(source.sequences(*arguments))

    trainer.source = Changed()


def hold_up(trainer: Any, asked: Path) -> None:
    """Its data comes late, or it collects the garbage of a crowd of objects at each step."""
    match asked.read_text() if asked.exists() else "":
        case "data":
            next_batch(trainer, lambda batch: time.sleep(0.08) or batch)  # type: ignore[func-returns-value]
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
        named_here, since = attempt <= len(faults), self.state.step - int(at)
        lasts = {"slow": sys.maxsize, "asked": sys.maxsize, "zeros": ROTTEN}.get(kind, 1)  # steps
        if kind == "zeros" and named_here and since == ROTTEN:
            kind, lasts = "zeros end", ROTTEN + 1
        due = named_here or kind in ("nan", "zeros")
        self.kept = named["gate"].__self__  # its snapshots
        if rank in (os.environ.get("RANK"), "all") and due and 0 <= since < lasts:
            disturb(self, kind)
        return step(self, *arguments, **named)

    return faulty


def disturbed(module: ModuleType) -> None:
    module.Trainer.step = wrap(module.Trainer.step)


def sick(_: ModuleType) -> None:
    from sickness import fall_sick

    fall_sick()


class Finder:
    """Lets one module be found as usual, and does something to it when it has been imported."""

    def __init__(self, wanted: str, then: Callable[[ModuleType], None]) -> None:
        self._wanted, self._then = wanted, then

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._wanted:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "DISTURB" in os.environ:
    sys.meta_path.insert(0, Finder("keepstep.llama.trainer", disturbed))
if "SICKNESS" in os.environ:
    sys.meta_path.insert(0, Finder("keepstep.validate.run", sick))
