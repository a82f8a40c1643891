"""A DDP script that keeps its state in memory by keepstep.session, and has no checkpoint of its own."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from keepstep.session import current

steps, kill_at = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
session = current()
snapshots = session.snapshots()
start = 0
if (found := snapshots.restore()) is not None:
    start, state = found
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if rank == 0:
        print(f"goes on from {start}", flush=True)

for step in range(start + 1, steps + 1):
    generator = torch.Generator().manual_seed(step * 100 + rank)
    x = torch.randn(8, 16, generator=generator)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    if step == kill_at and start == 0 and rank == 1:
        os.kill(os.getpid(), 9)
    optimizer.step()
    snapshots.take(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    session.step_done(step)

total = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()
if rank == 0:
    print(f"started at {start}, done at {steps}, weights {total.item():.12f}", flush=True)
snapshots.close()
dist.destroy_process_group()
