"""A script with checkpoints of its own on a shared folder, written at any moment: nothing fences them.

Every write is noted in a journal of its rank by the machine's monotonic clock, so that a test on one machine
can tell whether two attempts ever wrote at the same time. With `tell` its steps are known.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from keepstep import session

folder, tell, steps = Path(sys.argv[1]), sys.argv[2] == "tell", int(sys.argv[3])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
dist.init_process_group("gloo")
rank = dist.get_rank()
journal = (folder / f"journal-{attempt}-{rank}").open("a", buffering=1)
state = folder / "state"
start = torch.tensor([int(state.read_text()) if state.exists() else 0])
dist.broadcast(start, 0)  # what one rank found is what all go on from
progress = session.current() if tell else None
value = torch.ones(1)
for step in range(int(start) + 1, steps + 1):
    journal.write(f"{time.monotonic()}\n")  # as a script that saves on every rank
    dist.all_reduce(value)
    value /= dist.get_world_size()
    if rank == 0:
        draft = state.with_name(f"state-{attempt}")
        draft.write_text(str(step))
        draft.replace(state)
    if progress is not None:
        progress.step_done(step)
    time.sleep(0.05)
dist.destroy_process_group()
