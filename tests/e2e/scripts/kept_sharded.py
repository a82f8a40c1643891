"""An FSDP2 script that keeps each rank's shards in memory, and has no checkpoint of its own."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from keepstep.session import current

steps, kill_at = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
fully_shard(model).set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it adds
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
session = current()
snapshots = session.snapshots()


def state() -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


start = 0
if (found := snapshots.restore(like=state())) is not None:
    start, kept = found
    set_state_dict(model, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"])

for step in range(start + 1, steps + 1):
    generator = torch.Generator().manual_seed(step * 100 + rank)
    x = torch.randn(8, 16, generator=generator)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    if step == kill_at and start == 0 and rank == 1:
        os.kill(os.getpid(), 9)
    optimizer.step()
    snapshots.take(step, state())
    session.step_done(step)

total = torch.stack([p.full_tensor().double().sum() for p in state()["model"].values()]).sum()
if rank == 0:
    print(f"started at {start}, done at {steps}, weights {total.item():.12f}", flush=True)
snapshots.close()
dist.destroy_process_group()
