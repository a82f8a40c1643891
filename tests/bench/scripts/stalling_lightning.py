"""Lightning in a bad neighbourhood: long validations, storage and data that stall now and then.

stalling_lightning.py STEPS OUT
"""

import os
import sys
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

steps, out = int(sys.argv[1]), sys.argv[2]


class Rows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Every so many samples the storage behind it takes its time."""

    def __init__(self, length: int, stall_every: int) -> None:
        self.length, self.stall_every, self.given = length, stall_every, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.given += 1
        if self.given % self.stall_every == 0:
            time.sleep(4.0 + self.given % 5)
        row = torch.randn(16)
        return row, row.sum(0, keepdim=True)


class Model(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        inputs, targets = batch
        time.sleep(0.02)  # stands for the work of a real step, without the cores
        loss: torch.Tensor = (self.layers(inputs) - targets).square().mean()
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], number: int) -> None:
        time.sleep(0.1)
        if number == 60:  # this rank's validation does something else for a while
            time.sleep(12.0 * self.global_rank)
        self.log("loss", self.training_step(batch, number), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Slow(ModelCheckpoint):  # type: ignore[misc]
    """Its checkpoint folder is on a storage that others write to."""

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            time.sleep(5.0)


lightning.seed_everything(0)
rank = int(os.environ["RANK"])
trainer = lightning.Trainer(
    max_steps=steps, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
    callbacks=[Slow(dirpath=out, every_n_train_steps=200)], enable_model_summary=False,
    val_check_interval=300,
)  # fmt: skip
training, validation = Rows(20_000, 700 + 270 * rank), Rows(960, 100_000)
trainer.fit(Model(), DataLoader(training, batch_size=4), DataLoader(validation, batch_size=4))
