"""The job's figures for people's own tools: TensorBoard and Weights & Biases, written by one rank.

A thread of its own loads the packages and writes, so whatever a tool, its disk or its network does, no step
waits for it or fails: a writer that raises is told once and left, and what comes while it is too slow is left
out. After a recovery steps are done again. TensorBoard hides what it has from the restored step on
(purge_step); a run of Weights & Biases takes no step twice, so those that it has are not told again.
"""

import importlib.util
import math
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from keepstep.core.errors import InputError
from keepstep.llama.job import TrainJob

_WAITING_MAX = 1024  # figures of so many steps
_CLOSE_S = 30.0
_WANDB_INIT_S = 60.0


class Writer(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Silent without writers."""

    def __init__(self, writers: Mapping[str, Callable[[], Writer]]) -> None:
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_WAITING_MAX)
        self._full = False
        self._thread: threading.Thread | None = None
        if writers:
            self._thread = threading.Thread(target=self._work, args=(writers,), name="metrics", daemon=True)
            self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Figures after `step` completed steps; what is not finite is left out."""
        if self._thread is None:
            return
        try:
            self._waiting.put_nowait((step, {k: v for k, v in values.items() if math.isfinite(v)}))
        except queue.Full:
            if not self._full:
                _tell("metrics", "they are written too slowly, and some are left out")
            self._full = True

    def close(self) -> None:
        """What waits is written, within a bound."""
        if self._thread is None:
            return
        try:
            self._waiting.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_S)

    def _work(self, makers: Mapping[str, Callable[[], Writer]]) -> None:
        writers: dict[str, Writer] = {}
        for name, make in makers.items():
            _guarded(name, partial(_begin, writers, name, make))
        while (told := self._waiting.get()) is not None:
            for name, writer in list(writers.items()):
                if not _guarded(name, partial(self._hand_over, writer, *told)):
                    del writers[name]
        for name, writer in writers.items():
            _guarded(name, writer.close)

    def _hand_over(self, writer: Writer, step: int, values: Mapping[str, float]) -> None:
        writer.write(step, values)
        if self._waiting.empty():
            writer.flush()


def writers_of(job: TrainJob, step: int) -> dict[str, Callable[[], Writer]]:
    """Those that the job wants, which goes on after `step` completed steps.

    InputError for a package that is missing.
    """
    wanted: dict[str, Callable[[], Writer]] = {}
    if folder := job.metrics.get("tensorboard"):
        wanted["tensorboard"] = lambda: TensorBoard(Path(folder) / job.id, step=step)
    if options := job.metrics.get("wandb"):
        wanted["wandb"] = lambda: WeightsAndBiases(job, options)
    for package in wanted:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"{package} is not installed here", where=f"metrics.{package}",
                why="the rank that reports writes them", next="Install keepstep[metrics], or leave it out.",
            )  # fmt: skip
    return wanted


class TensorBoard:
    def __init__(self, folder: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run for the whole job, by its id, whichever attempt writes."""

    def __init__(self, job: TrainJob, options: Mapping[str, Any]) -> None:
        import wandb

        chosen = {name: value for name, value in options.items() if value is not None}
        self._run: Any = wandb.init(
            **{"name": job.id, **chosen}, id=job.id, resume="allow", allow_val_change=True,
            config={
                "model": asdict(job.shape), "layout": str(job.layout), "steps": job.steps,
                "global_tokens": job.global_tokens, "seq": job.seq, "optimizer": asdict(job.optimizer),
            },
            settings=wandb.Settings(console="off", silent=True, init_timeout=_WANDB_INIT_S),
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """It is on its way already."""

    def close(self) -> None:
        self._run.finish()


def _begin(writers: dict[str, Writer], name: str, make: Callable[[], Writer]) -> None:
    writers[name] = make()


def _guarded(name: str, do: Callable[[], object]) -> bool:
    try:
        do()
    except Exception as error:  # noqa: BLE001 - outermost: somebody else's code, which must cost no step
        _tell(name, f"it is left, training goes on: {type(error).__name__}: {error}")
        return False
    return True


def _tell(name: str, what: str) -> None:
    sys.stderr.write(f"metrics: {name}: {what}\n")
