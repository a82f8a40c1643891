"""A DDP script as its author wrote it, for torchrun: nothing in it knows of keepstep."""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--kill-at", type=int, default=0)
parser.add_argument("--hang-at", type=int, default=0)
options = parser.parse_args()

torch.manual_seed(0)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
start = 0
if Path(options.checkpoint).exists():
    saved = torch.load(options.checkpoint)
    model.load_state_dict(saved["model"])
    start = saved["step"]

for step in range(start + 1, options.steps + 1):
    generator = torch.Generator().manual_seed(step * 100 + rank)
    x = torch.randn(8, 16, generator=generator)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    if step == options.kill_at and start == 0 and rank == 1:
        os.kill(os.getpid(), 9)
    while step == options.hang_at and start == 0 and rank == 1:
        pass
    optimizer.step()
    if step % 5 == 0:
        if rank == 0:
            torch.save({"model": model.state_dict(), "step": step}, options.checkpoint + ".tmp")
            Path(options.checkpoint + ".tmp").replace(options.checkpoint)
        dist.barrier()

total = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()
if rank == 0:
    print(f"started at {start}, done at {options.steps}, weights {total.item():.12f}", flush=True)
dist.destroy_process_group()
