"""From a fault to the next completed step, beside torchrun and NVIDIA's NVRx in the same run.

    .venv/bin/python tests/bench/recovery.py [--times N] [--only NAME ...]

Seconds are medians. A step is what the script itself wrote down, or the built-in trainer's ranks into their
beacons. The faults: a rank of two killed, stopped, in an endless loop (after a hundred steps); a rank of
eight killed; a node killed (next step from its buddy's memory); a node whose packets are dropped (no FIN;
needs root and ip). The last line is one JSON object.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster import Cluster
from hosts import missing
from keepstep.agent.rank import processes
from site_of_hosts import standing

SCRIPT = Path(__file__).parent / "scripts" / "pair.py"
FOR_EVER = 1_000_000
FEW, OFTEN = 10, 100  # steps before a fault; a bound is learnt from phases that were seen often
DEADLINE_S = 180.0
ASKED_EVERY_S = 0.25  # the times are the timeline's: asking more often only takes processors from the job
PAIR = """
name: pair
resources: {{nodes: 1, gpus_per_node: 2}}
parallelism: {{dp: 2}}
run:
  command: [python, {script}, "{steps}", {folder}]
  ship: none
recovery: {{fenced: true, restarts: {{max: 100}}}}
"""
CUBE = """
name: cube
pool: {pool}
resources: {{nodes: 2, gpus_per_node: 4, spares: {spares}}}
parallelism: {{tp: 2, pp: 2, dp: 2}}
run:
  llama:
    model: debug
    data: {{source: stdlib}}
    steps: 100000
    batch: {{global_tokens: 1024, seq: 256}}
checkpoint: {{dir: {folder}, every: 100000 steps}}
recovery: {{restarts: {{max: 100}}}}
"""


def wait_for(condition: Callable[[], Any], what: str, every_s: float = 0.002) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {DEADLINE_S:g} s for {what}")
        time.sleep(every_s)
    return found


class Steps:
    """What pair.py wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lines(self) -> list[tuple[float, int, int, int]]:
        path = self.folder / "steps"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        return [(float(at), int(rank), int(step), int(pid)) for at, rank, step, pid in map(str.split, whole)]

    def pids(self) -> dict[int, int]:
        return {rank: pid for _, rank, _, pid in self.lines()[-50:]}

    def steady(self, steps: int = FEW) -> dict[int, int]:
        """Both ranks have made so many steps in their present processes: their pids."""

        def both() -> dict[int, int] | None:
            pids = self.pids()
            seen = [pid for *_, pid in self.lines()]
            return pids if len(pids) == 2 and all(seen.count(pid) >= steps for pid in pids.values()) else None

        found: dict[int, int] = wait_for(both, f"{steps} steps")
        return found

    def next_after(self, at: float, old: set[int]) -> tuple[float, int]:
        """Seconds from `at` to the first step of a new process, and how many steps were done again."""

        def first() -> tuple[float, int] | None:
            lines = self.lines()
            done = max((step for *_, step, pid in lines if pid in old), default=0)
            new = [(when - at, step) for when, _, step, pid in lines if when > at and pid not in old]
            return (new[0][0], max(0, done - new[0][1] + 1)) if new else None

        found: tuple[float, int] = wait_for(first, "the next step")
        return found


class Figures:
    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.replayed: list[int] = []
        self.parts: dict[str, list[dict[str, float]]] = {}

    def add(self, name: str, seconds: float, parts: dict[str, float] | None = None) -> None:
        self.seconds.setdefault(name, []).append(seconds)
        if parts:
            self.parts.setdefault(name, []).append(parts)
        told = "  ".join(f"{part} {at:.3f}" for part, at in (parts or {}).items())
        print(f"{name:24} {seconds:7.3f} s   {told}", flush=True)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.seconds.items()}


def parts_of(events: Iterable[Any], since_wall: float) -> dict[str, float]:
    """When the timeline says that what was done, in seconds after the fault."""
    names = {"detected": "detected", "placed": "decided", "dead": "stopped", "went": "prepared",
             "rank_started": "started", "stepped": "first step"}  # fmt: skip
    parts: dict[str, float] = {}
    for event in events:
        if event["at"] >= since_wall and event["kind"] in names:
            parts.setdefault(names[event["kind"]], round(event["at"] - since_wall, 3))
    return parts


# ---------------------------------------------------------------- two ranks


def kill(pids: dict[int, int], folder: Path) -> None:
    os.kill(pids[1], signal.SIGKILL)


def stop(pids: dict[int, int], folder: Path) -> None:
    os.kill(pids[1], signal.SIGSTOP)


def spin(pids: dict[int, int], folder: Path) -> None:
    (folder / "spin").write_text("1")


FAULTS: dict[str, Callable[[dict[int, int], Path], None]] = {"kill_2": kill, "stop_2": stop, "spin_2": spin}


class KeepstepPair:
    """The script as a job on a node of this machine; one job a fault, so that budgets start anew."""

    overrides: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder / "home", nodes=1, slots=2)
        self._folder, self._jobs = folder, 0

    def fault(self, name: str, figures: Figures, told: str = "") -> None:
        """`told`: what the figure is called, if not after the fault."""
        self._jobs += 1
        folder = self._folder / f"pair-{self._jobs}"
        folder.mkdir()
        steps = Steps(folder)
        spec = PAIR.format(script=SCRIPT, steps=FOR_EVER, folder=folder)
        job = self.cluster.submit(spec, *self.overrides)
        pids = steps.steady(OFTEN if name == "spin_2" else FEW)
        at, wall = time.monotonic(), time.time()
        FAULTS[name](pids, folder)
        seconds, replayed = steps.next_after(at, set(pids.values()))
        wait_for(lambda: self.cluster.job(job)["attempt"]["first_step_at"], "the job to run again")
        figures.add(f"{told or name}_s", seconds, parts_of(timeline(self.cluster, job), wall))
        figures.replayed.append(replayed)
        incident = self.cluster.incidents(job)[-1]
        if name == "spin_2":
            print(f"    {incident['evidence']['noticed']}", flush=True)
        self.cluster.client.post(f"/jobs/{job}/cancel")
        self.cluster.wait_state(job, "cancelled")


# Each is told to be as quick as its options go for steps of this length.
TORCHRUN = (
    str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2", "--max-restarts=3",
)  # fmt: skip
# A heartbeat of each rank after each step, missed after two seconds, looked for twice a second. It lives in
# an environment of its own (make .venv/.nvrx; CPython 3.10 to 3.12).
NVRX = (
    str(Path(sys.prefix) / "nvrx" / "bin" / "python"), "-m", "nvidia_resiliency_ext.fault_tolerance.launcher",
    "--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
    "--max-restarts=3", "--ft-initial-rank-heartbeat-timeout=60", "--ft-rank-heartbeat-timeout=2",
    "--ft-workload-check-interval=0.5", "--workers-stop-timeout=1",  # of 30 s, before it kills what is left
)  # fmt: skip
PEERS = {"torchrun": TORCHRUN, "nvrx": NVRX}


def peer(who: str, fault: str, folder: Path, figures: Figures) -> None:
    """The same script and fault under somebody else's launcher."""
    folder.mkdir()
    steps = Steps(folder)
    # What they leave when they are killed is in the folder, and goes with it.
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TMPDIR": str(folder)}
    if who == "torchrun":  # which sees a stopped rank by what its collectives say
        env["PAIR_TIMEOUT_S"] = "600" if fault == "kill_2" else "5"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*PEERS[who], str(SCRIPT), str(FOR_EVER), str(folder)],
            env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        pids = steps.steady()
        at = time.monotonic()
        FAULTS[fault](pids, folder)
        seconds, _ = steps.next_after(at, set(pids.values()))
        figures.add(f"{fault}_{who}_s", seconds)
    finally:
        family = processes.descendants(process.pid, processes.table())  # workers have sessions of their own
        process.kill()
        process.wait()
        for worker in family:
            processes.send(worker, signal.SIGKILL)


# ---------------------------------------------------------------- eight ranks


class Eight:
    """The built-in trainer 2x2x2 on two nodes of a machine, one more standing by."""

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder / "home", nodes=3, slots=4, return_after_s=3600.0)
        self.job = self.cluster.submit(CUBE.format(pool="local", spares=1, folder=folder / "checkpoints"))
        self.cluster.wait_step(self.job, 10)

    def measure(self, name: str, fault: Callable[[], None], figures: Figures) -> None:
        cluster, job = self.cluster, self.job
        attempt = cluster.job(job)["attempt"]["number"]
        cluster.wait_step(job, cluster.job(job)["progress"]["step"] + 3, attempt=attempt)
        before = max(point["step"] for point in points(cluster, job))
        wall = time.time()
        fault()

        def stepped() -> bool:
            now = cluster.job(job)["attempt"]
            return bool(now and now["number"] > attempt and now["first_step_at"])

        wait_for(stepped, "the next attempt's first step", ASKED_EVERY_S)
        new = [point for point in points(cluster, job) if point["attempt"] > attempt]
        done = max(p["step"] for p in points(cluster, job) if p["attempt"] == attempt)
        first = min(new, key=lambda point: point["step"])
        figures.add(f"{name}_s", first["at"] - wall, parts_of(timeline(cluster, job), wall))
        if name == "kill_8":
            figures.replayed.append(max(0, max(done, before) - first["step"] + 1))

    def kill_rank(self) -> None:
        self.cluster.kill_rank(self.job, 3)

    def kill_node(self) -> None:
        self.cluster.lose_node(self.cluster.job(self.job)["attempt"]["nodes"][0])


def timeline(cluster: Cluster, job: str) -> Iterable[Any]:
    return cluster.client.pages("/events", "events", limit=1000, job=job)


def points(cluster: Cluster, job: str) -> list[dict[str, Any]]:
    return list(cluster.client.pages(f"/jobs/{job}/metrics", "points", limit=10_000))


def silent_node(folder: Path, figures: Figures) -> None:
    """A node of the gang is cut off: nothing it sends arrives, and no connection is closed."""
    folder.mkdir()
    with standing(folder) as there:
        spec = there.folder / "job.yaml"
        spec.write_text(CUBE.format(pool="static", spares=1, folder=there.shared))
        job = str(there.keepstep("submit", str(spec), "-o", "name"))
        there.until_step(job, 10)
        node = there.job(job)["attempt"]["nodes"][1]
        wall = time.time()
        there.hosts.cut(node)

        def back() -> float | None:
            attempt = there.job(job)["attempt"]
            return attempt["first_step_at"] if attempt["number"] > 1 else None

        there.until(back, "the next attempt's first step", 300)
        parts = parts_of(there.keepstep("events", job, "-o", "json")["events"], wall)
        figures.add("node_silent_s", (back() or 0.0) - wall, parts)
        (incident,) = there.keepstep("describe", job, "-o", "json")["incidents"]
        print(f"    {incident['evidence']['what']}", flush=True)
        there.keepstep("cancel", job, "--yes")


# ---------------------------------------------------------------- all


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--times", type=int, default=5)
    options.add_argument("--only", nargs="*", default=[])
    chosen = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended then, too

    def wanted(name: str) -> bool:
        return not chosen.only or name in chosen.only

    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="keepstep-bench-") as name:
        folder = Path(name)
        if any(map(wanted, FAULTS)):
            (folder / "pair").mkdir()
            pair = KeepstepPair(folder / "pair")
            try:
                for fault in filter(wanted, FAULTS):
                    for number in range(chosen.times):
                        pair.fault(fault, figures)
                        for who in filter(wanted, beside(fault, number)):
                            peer(who, fault, folder / f"{who}-{fault}-{number}", figures)
            finally:
                pair.cluster.close()
        if wanted("kill_8") or wanted("node_killed"):
            (folder / "eight").mkdir()
            eight = Eight(folder / "eight")
            try:
                for _ in range(chosen.times if wanted("kill_8") else 0):
                    eight.measure("kill_8", eight.kill_rank, figures)
                if wanted("node_killed"):
                    eight.measure("node_killed", eight.kill_node, figures)
            finally:
                eight.cluster.client.post(f"/jobs/{eight.job}/cancel")
                eight.cluster.close()
        if wanted("node_silent") and not missing():
            silent_node(folder / "site", figures)
    report(figures, chosen.times)


def beside(fault: str, number: int) -> Iterable[str]:
    """The peers that are measured after a fault; torchrun takes 45 s to notice a stopped rank."""
    if fault == "kill_2" or (fault == "stop_2" and number == 0):
        yield "torchrun"
    if fault == "stop_2" and Path(NVRX[0]).exists():
        yield "nvrx"


def report(figures: Figures, times: int) -> None:
    import torch

    medians = figures.medians()
    for fault, who in product(FAULTS, PEERS):
        if f"{fault}_{who}_s" in medians and f"{fault}_s" in medians:
            medians[f"{fault}_vs_{who}"] = medians[f"{fault}_{who}_s"] / medians[f"{fault}_s"]
    if figures.replayed:
        medians["steps_replayed_max"] = max(figures.replayed)
    context = {
        "times": times, "cores": os.cpu_count(), "torch": torch.__version__,
        "load_1min": round(os.getloadavg()[0], 1), "node_silent": missing() or "in network namespaces",
        "nvrx": "0.4.1" if Path(NVRX[0]).exists() else "not installed: make .venv/.nvrx",
    }  # fmt: skip
    rounded = {name: round(value, 3) for name, value in sorted(medians.items())}
    print(json.dumps({"bench": "recovery", "figures": rounded, "context": context}))


if __name__ == "__main__":
    main()
