"""A plain DistributedDataParallel script, as written for torchrun. Nothing in it knows of keepstep.

keepstep run --nproc 2 deploy/examples/train.py --steps 30 --checkpoint /tmp/model.pt
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--checkpoint", type=Path, help="written every ten steps, continued from if it exists")
options = parser.parse_args()

torch.manual_seed(0)
dist.init_process_group()
rank, world_size = dist.get_rank(), dist.get_world_size()
model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
first = 0
if options.checkpoint and options.checkpoint.exists():
    saved = torch.load(options.checkpoint)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first = saved["step"]

for step in range(first + 1, options.steps + 1):
    generator = torch.Generator().manual_seed(step * world_size + rank)
    x = torch.randn(32, 16, generator=generator)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if rank == 0 and step % 10 == 0:
        print(f"step {step} loss {loss.item():.4f}", flush=True)
        if options.checkpoint:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            partial = options.checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(options.checkpoint)  # whole or not at all

dist.destroy_process_group()
