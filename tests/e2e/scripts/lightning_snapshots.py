"""Lightning with its states in memory only: dropout, a scheduler, a loss scale, a loader that has a state."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from keepstep.session.lightning import SnapshotCallback

steps, kill_at = int(sys.argv[1]), int(sys.argv[2])


class Resumable(DataLoader[Any]):
    """Goes on in the middle of an epoch, as Lightning asks of a loader."""

    first = given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        first, self.first = self.first, 0
        return self._from(first, super().__iter__())

    def _from(self, first: int, batches: Iterator[Any]) -> Iterator[Any]:
        for self.given, batch in enumerate(batches, 1):
            if self.given > first:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["given"]


class Model(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, kill_at: int) -> None:
        super().__init__()
        self.kill_at = kill_at
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 1))
        self.began = 0

    def on_train_start(self) -> None:
        self.began = self.trainer.global_step

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        inputs, targets = batch
        if self.global_step + 1 == self.kill_at and self.began == 0 and self.global_rank == 1:
            os.kill(os.getpid(), 9)
        loss: torch.Tensor = (self.layers(inputs) - targets).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(resume_from: str | None, *callbacks: lightning.Callback) -> tuple[int, int, str]:
    """At which step it began and ended, and what the weights add up to, with the loss scale."""
    lightning.seed_everything(0)
    inputs = torch.randn(64, 16)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    loader = Resumable(data, batch_size=4, sampler=DistributedSampler(data, world, rank, shuffle=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=7)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=2, strategy="ddp", callbacks=list(callbacks),
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )  # fmt: skip
    model = Model(kill_at if callbacks else 0)
    trainer.fit(model, loader, ckpt_path=resume_from)
    total = sum(p.detach().double().sum().item() for p in model.parameters())
    return model.began, trainer.global_step, f"{total:.12f} x{scaler.get_scale():g}"


snapshots = SnapshotCallback()
found = snapshots.checkpoint()
began, done, total = trained(found, snapshots)
assert found is None or not Path(found).exists()
*_, undisturbed = trained(None)
if os.environ["RANK"] == "0":
    print(f"began at {began}, done at {done}: {total}, undisturbed {undisturbed}", flush=True)
