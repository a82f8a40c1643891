"""Two ranks that step every few hundredths of a second, for keepstep, torchrun, NVRx and Ray Train alike.

    pair.py STEPS FOLDER    every completed step is a line in FOLDER/steps: monotonic seconds, rank, step, pid

It goes on from the last step in FOLDER/state, as a script with a checkpoint of its own does. A rank that
FOLDER/spin names takes that file away and loops for ever in its backward pass.
"""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from keepstep.session import Phase, current

marks = current()  # silent under torchrun

TIMEOUT_S = float(os.environ.get("PAIR_TIMEOUT_S", "600"))


def main(steps: int, folder: Path) -> None:
    if not dist.is_initialized():  # Ray Train has done it
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    state, lines = folder / "state", os.open(folder / "steps", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    step = int(state.read_text() or 0) if state.exists() else 0
    beat = heartbeat()
    while step < steps:
        marks.phase(Phase.FORWARD)
        loss = model(torch.randn(64, 256)).square().mean()
        marks.phase(Phase.BACKWARD)
        spin(folder / "spin", rank)
        loss.backward()
        for parameter in model.parameters():
            marks.wait("dp", step)
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            marks.go_on()
        marks.phase(Phase.OPTIMIZER)
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.01)  # stands for the work of a real step, without the cores
        step += 1
        os.write(lines, f"{time.monotonic():.6f} {rank} {step} {os.getpid()}\n".encode())
        marks.step_done(step, loss=float(loss.detach()))
        beat()
        if rank == 0:
            draft = folder / "state.new"
            draft.write_text(str(step))
            draft.replace(state)
    dist.destroy_process_group()


def heartbeat() -> Callable[[], object]:
    """NVRx's launcher knows that a rank lives when the rank says so."""
    if "FT_RANK_MONITOR_IPC_SOCKET" not in os.environ:
        return lambda: None
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    monitor = RankMonitorClient()
    monitor.init_workload_monitoring()
    beat: Callable[[], object] = monitor.send_heartbeat
    return beat


def spin(order: Path, rank: int) -> None:
    if order.exists() and order.read_text() == f"{rank}":
        order.unlink()
        while True:
            pass


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
