"""A loop of one's own with Hugging Face's accelerate, its state saved by the library."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", required=True)
options = parser.parse_args()

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
inputs = torch.randn(8192, 16)
data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
saved = sorted(Path(options.out).glob("step-*[0-9]")) if Path(options.out).is_dir() else []
began = 0
if saved:
    accelerator.load_state(str(saved[-1]))
    began = int(saved[-1].name.split("-")[1])

step = began
for batch, targets in accelerator.skip_first_batches(data, began):
    loss = (model(batch) - targets).square().mean()
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    step += 1
    if step % 10 == 0:
        folder = Path(options.out) / f"step-{step:06d}"
        accelerator.save_state(f"{folder}.part")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            Path(f"{folder}.part").rename(folder)
    if step == options.steps:
        break

if accelerator.is_main_process:
    total = sum(p.detach().double().sum().item() for p in model.parameters())
    print(f"began at {began}, done at {step}, weights {total:.10f}", flush=True)
accelerator.end_training()
