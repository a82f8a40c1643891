"""One of two ranks is stopped under NVIDIA's NVRx: from the signal to the next step of recovery.py's script.

    .venv/bin/python tests/bench/nvrx.py [--times N]

`make .venv/.nvrx` installs it, in an environment of its own. Its launcher hears a heartbeat of
each rank after each step, misses it after two seconds, and looks twice a second: as quick as its options go
for steps of this length. The last line is one JSON object; there are no figures where it is not installed.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.recovery import FAULTS, FOR_EVER, SCRIPT, Figures, Steps
from keepstep.agent.rank import processes

PYTHON = Path(sys.prefix) / "nvrx" / "bin" / "python"
LAUNCHER = "nvidia_resiliency_ext.fault_tolerance.launcher"
OPTIONS = {
    "nnodes": "1", "nproc-per-node": "2", "rdzv-backend": "c10d", "rdzv-endpoint": "127.0.0.1:0",
    "max-restarts": "3", "ft-initial-rank-heartbeat-timeout": "60", "ft-rank-heartbeat-timeout": "2",
    "ft-workload-check-interval": "0.5", "workers-stop-timeout": "1",  # of 30 s, before it kills what is left
}  # fmt: skip


def missing() -> str:
    """Why it cannot be measured here; empty: it can."""
    return "" if PYTHON.exists() else "not installed: make .venv/.nvrx (CPython 3.10 to 3.12)"


def stopped(folder: Path, figures: Figures, name: str = "stop_2") -> None:
    """Start it in a new folder, and measure one fault of `recovery.FAULTS` as NAME_nvrx_s."""
    folder.mkdir()
    steps = Steps(folder)
    options = [f"--{option}={value}" for option, value in OPTIONS.items()]
    command = [str(PYTHON), "-m", LAUNCHER, *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, str(SCRIPT), str(FOR_EVER), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        pids = steps.steady()
        at = time.monotonic()
        FAULTS[name](pids, folder)
        seconds, _ = steps.next_after(at, set(pids.values()))
        figures.add(f"{name}_nvrx_s", seconds)
    finally:
        family = processes.descendants(process.pid, processes.table())  # workers have sessions of their own
        process.kill()
        process.wait()
        for worker in family:
            processes.send(worker, signal.SIGKILL)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--times", type=int, default=3)
    times = options.parse_args().times
    figures = Figures()
    if not missing():
        with tempfile.TemporaryDirectory(prefix="keepstep-bench-") as name:
            for number in range(times):
                stopped(Path(name) / str(number), figures)
    context = {
        "times": times, "nvrx": missing() or "0.4.1",
        "python": platform.python_version(), "load_1min": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    medians = {name: round(statistics.median(values), 3) for name, values in figures.seconds.items()}
    print(json.dumps({"bench": "nvrx", "figures": medians, "context": context}))


if __name__ == "__main__":
    main()
