"""A Lightning script as its author wrote it: the library's own checkpoints, resumed from the newest."""

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", required=True)
options = parser.parse_args()


class Model(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
        self.began = 0

    def on_train_start(self) -> None:
        self.began = self.trainer.global_step

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        inputs, targets = batch
        loss: torch.Tensor = (self.layers(inputs) - targets).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


lightning.seed_everything(0)
inputs = torch.randn(4096, 16)
data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)
saving = ModelCheckpoint(dirpath=options.out, every_n_train_steps=10, save_last=True)
trainer = lightning.Trainer(
    max_steps=options.steps, accelerator="cpu", devices=2, strategy="ddp", callbacks=[saving], logger=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
last = Path(options.out) / "last.ckpt"
model = Model()
trainer.fit(model, data, ckpt_path=str(last) if last.exists() else None)
if trainer.is_global_zero:
    total = sum(p.detach().double().sum().item() for p in model.parameters())
    print(f"began at {model.began}, done at {trainer.global_step}, weights {total:.10f}", flush=True)
