"""Snapshots in memory for Lightning:

    from keepstep.session.lightning import SnapshotCallback

    snapshots = SnapshotCallback()
    trainer = lightning.Trainer(..., callbacks=[snapshots])
    trainer.fit(model, data, ckpt_path=snapshots.checkpoint())

After each optimizer step every rank keeps what Lightning would write into a checkpoint (weights, optimizers,
schedulers, the loss scale of fp16, loops, callbacks) and its random numbers in memory; `checkpoint()` gives
what is there back as a checkpoint file. Needs checkpoint.snapshot_every in the job's spec; outside keepstep
it does nothing.

Not covered: models that the ranks share (FSDP, DeepSpeed, ModelParallel: refused), random numbers of
data-loader workers. Lightning itself goes on within an epoch only with a data loader that has `state_dict`
and `load_state_dict`; any other begins its epoch anew. Hooks named on_save_checkpoint are called each step.
"""

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
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError as error:
    raise ImportError(
        f"keepstep.session.lightning needs lightning ({error}): pip install lightning"
    ) from error


class SnapshotCallback(Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        self._session = current()
        self._snapshots = self._session.snapshots()
        self._folder: Path | None = None
        self._random: dict[str, Any] | None = None
        self._done = 0  # steps

    def checkpoint(self, otherwise: str | None = None) -> str | None:
        """What `trainer.fit` begins from: the state in memory, else `otherwise`.

        Errors: Unreachable, Refused when the state is in memory and this rank cannot get it.
        """
        found = self._snapshots.restore()
        if found is None:
            return otherwise
        self._done, state = found
        self._random = state["random"]
        self._folder = Path(tempfile.mkdtemp(prefix="keepstep-snapshot-"))
        path = self._folder / "snapshot.ckpt"
        torch.save(state["checkpoint"], path)
        return str(path)

    # ---------------------------------------------------------------- what Lightning calls

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise InputError(
                f"snapshots under {type(trainer.strategy).__name__} are not covered",
                where="SnapshotCallback",
                next="Use keepstep.session.current().snapshots() with each rank's own part, or leave it out.",
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()
        self._done = trainer.global_step
        if self._random is not None:
            randomness.put_back(self._random)
            self._random = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._session.phase(Phase.FORWARD)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._done:
            return  # gradients are still being accumulated
        self._done = step
        # The same that `trainer.save_checkpoint` writes; there is no public name for the value alone.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self._snapshots.take(step, {"checkpoint": checkpoint, "random": randomness.captured()})
        self._session.step_done(step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._snapshots.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    def _forget(self) -> None:
        """The file that was resumed from: it has been read by now."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
