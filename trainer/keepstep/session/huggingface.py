"""Snapshots in memory for Hugging Face's Trainer:

    from keepstep.session.huggingface import SnapshotCallback

    snapshots = SnapshotCallback()
    trainer = Trainer(..., callbacks=[snapshots])
    trainer.train(resume_from_checkpoint=snapshots.checkpoint())

After each step every rank keeps weights, optimizer, scheduler, random numbers, the loss scale of fp16 and the
trainer's state in memory; `checkpoint()` gives what is there back as a checkpoint folder, which the Trainer
loads as one of its own: it skips the batches that were used. Needs checkpoint.snapshot_every in the job's
spec; outside keepstep it does nothing.

Not covered: models that the ranks share (FSDP, DeepSpeed, tensor parallel: refused), states of other
callbacks, lines of the log before the last hundred, a dataset that is an iterator of its own (the Trainer
fast-forwards it by reading).
"""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from keepstep.core.beacon import Phase
from keepstep.core.errors import InputError
from keepstep.session import randomness
from keepstep.session.progress import current

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
    from transformers.utils import WEIGHTS_NAME
except ImportError as error:
    raise ImportError(
        f"keepstep.session.huggingface needs transformers ({error}): pip install transformers accelerate"
    ) from error

_LOG_LINES = 100  # a state that grows with every step would need larger slots all the time


class SnapshotCallback(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self._session = current()
        self._snapshots = self._session.snapshots()
        self._folder: Path | None = None

    def checkpoint(self, otherwise: str | None = None) -> str | None:
        """What `trainer.train` resumes from: the state in memory, else `otherwise`.

        Errors: Unreachable, Refused when the state is in memory and this rank cannot get it.
        """
        found = self._snapshots.restore()
        if found is None:
            return otherwise
        _, state = found
        folder = self._folder = Path(tempfile.mkdtemp(prefix="keepstep-snapshot-"))
        torch.save(state["model"], folder / WEIGHTS_NAME)
        torch.save(state["optimizer"], folder / OPTIMIZER_NAME)
        torch.save(state["scheduler"], folder / SCHEDULER_NAME)
        if state["scaler"]:
            torch.save(state["scaler"], folder / SCALER_NAME)
        (folder / TRAINER_STATE_NAME).write_text(state["trainer"])
        world = self._session.world_size
        name = "rng_state.pth" if world == 1 else f"rng_state_{self._session.rank}.pth"
        torch.save(randomness.native(state["random"]), folder / name)
        return str(folder)

    # ---------------------------------------------------------------- what the Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        shared = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
        if shared:
            raise InputError(
                f"snapshots of a model that {shared[0]} cuts over ranks are not covered",
                where="SnapshotCallback",
                next="Use keepstep.session.current().snapshots() with each rank's own part, or leave it out.",
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._session.phase(Phase.FORWARD)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._forget()
        figures = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        scaler = getattr(more["optimizer"], "scaler", None)  # of accelerate's wrapper, for fp16
        figures["log_history"] = state.log_history[-_LOG_LINES:]
        self._snapshots.take(
            state.global_step,
            {
                "model": more["model"].state_dict(), "optimizer": more["optimizer"].state_dict(),
                "scheduler": more["lr_scheduler"].state_dict(), "random": randomness.captured(),
                "scaler": scaler.state_dict() if scaler else None, "trainer": json.dumps(figures),
            },
        )  # fmt: skip
        self._session.step_done(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._forget()
        self._snapshots.close()

    def _forget(self) -> None:
        """The folder that was resumed from: it is read until the first step begins."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
