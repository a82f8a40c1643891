"""A DDP script: after short steps rank 0 evaluates by itself for long, the others are at a barrier."""

import argparse
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--evaluate-at", type=int, default=30)
parser.add_argument("--evaluate-s", type=float, default=20.0)
options = parser.parse_args()

dist.init_process_group("gloo")
model = DistributedDataParallel(nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(1, options.steps + 1):
    loss = model(torch.randn(8, 16)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    time.sleep(0.05)
    if step == options.evaluate_at:
        if dist.get_rank() == 0:
            until = time.monotonic() + options.evaluate_s
            with torch.no_grad():
                while time.monotonic() < until:
                    model.module(torch.randn(8, 16))
        dist.barrier()
print(f"done at {options.steps}", flush=True)
dist.destroy_process_group()
