"""A user's own 2 x 2 x 2 script: plain torch, its own groups and checkpoint; two lines tell its steps.

Each of the eight ranks holds a vector; a step sums along tensor, pipeline and data groups in turn, so that no
rank can step without all the others.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from keepstep import session

steps, folder = int(sys.argv[1]), Path(sys.argv[2])
state_file = folder / "state.json"
progress = session.current()
dist.init_process_group("gloo")
rank = dist.get_rank()
tp, pp, dp = rank % 2, rank // 2 % 2, rank // 4
groups: list[dist.ProcessGroup] = []
for axis in (1, 2, 4):
    for first in (r for r in range(8) if not r & axis):
        group = dist.new_group([first, first | axis])
        if rank in (first, first | axis):
            assert isinstance(group, dist.ProcessGroup)
            groups.append(group)

start, value = 0, torch.full((1000,), float(rank + 1), dtype=torch.float64)
if state_file.exists():
    saved = json.loads(state_file.read_text())
    start, value = saved["step"], torch.full((1000,), saved["values"][rank], dtype=torch.float64)
print(f"rank {rank} tp={tp} pp={pp} dp={dp} starts at step {start} on {os.uname().nodename}", flush=True)

for step in range(start + 1, steps + 1):
    for group in groups:
        dist.all_reduce(value, group=group)
        value /= 2
    value += (rank + step) % 7
    progress.step_done(step)
    if step % 5 == 0:
        values = [torch.zeros(1, dtype=torch.float64) for _ in range(8)]
        dist.all_gather(values, value[:1].contiguous())
        if rank == 0:
            temporary = state_file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"step": step, "values": [float(v) for v in values]}))
            temporary.replace(state_file)
    time.sleep(0.05)

if rank == 0:
    (folder / "result.json").write_text(json.dumps({"step": steps, "value": float(value[0])}))
dist.destroy_process_group()
