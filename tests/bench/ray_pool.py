"""From a fault to the next completed step on Ray, beside the local pool and Ray Train v2 in the same run.

    .venv/bin/python tests/bench/ray_pool.py [--times N] [--only pairs|raylet]

A real Ray cluster on this machine, one node for pairs of ranks and three for a gang of eight. Seconds are
medians. `kill`: a rank of two is killed, on the local pool, on Ray, and under Ray Train, by turns. `raylet
killed`: under one node of two, a third standing by. `submit`: from submitting to the first step of two ranks
that nothing was loaded for. The last line is one JSON object.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.recovery import (
    CUBE,
    FOR_EVER,
    PAIR,
    SCRIPT,
    Figures,
    KeepstepPair,
    Steps,
    parts_of,
    points,
    timeline,
    wait_for,
)
from cluster import Cluster
from keepstep.agent.rank import processes
from keepstep.cli.rayed import RayOptions
from ray_cluster import RayCluster

LABEL = "bench=pair"
TRAIN = Path(__file__).parent / "scripts" / "pair_on_ray_train.py"


def on_ray(ray: RayCluster, home: Path, label: str) -> Cluster:
    asked = RayOptions(
        address=ray.address, resource=ray.resource, labels=(label,), folder=str(home / "nodes")
    )
    return Cluster(home, nodes=0, slots=2, ray=asked)


class RayPair(KeepstepPair):
    """The same on the pool of the Ray cluster."""

    overrides = ("pool=ray",)

    def __init__(self, folder: Path, ray: RayCluster) -> None:
        self.cluster = on_ray(ray, folder / "home", LABEL)
        self._folder, self._jobs = folder, 0


def first_step(cluster: Cluster, folder: Path, name: str, figures: Figures, *overrides: str) -> None:
    folder.mkdir()
    at = time.monotonic()
    job = cluster.submit(PAIR.format(script=SCRIPT, steps=FOR_EVER, folder=folder), *overrides)
    wait_for(lambda: Steps(folder).lines(), "the first step")
    figures.add(f"{name}_s", Steps(folder).lines()[0][0] - at)
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")


def ray_train(ray: RayCluster, folder: Path, figures: Figures, times: int) -> None:
    """The first step, and a kill `times` times."""
    folder.mkdir()
    steps = Steps(folder)
    command = [sys.executable, str(TRAIN), ray.address, ray.resource, LABEL, str(FOR_EVER), str(folder)]
    at = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "RAY_TRAIN_V2_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        )  # fmt: skip
    try:
        wait_for(steps.lines, "the first step")
        figures.add("submit_ray_train_s", steps.lines()[0][0] - at)
        for _ in range(times):
            pids = steps.steady()
            killed_at = time.monotonic()
            os.kill(pids[1], signal.SIGKILL)
            seconds, _ = steps.next_after(killed_at, set(pids.values()))
            figures.add("kill_ray_train_s", seconds)
    finally:
        process.send_signal(signal.SIGINT)
        family = processes.descendants(process.pid, processes.table())
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for one in family:
            processes.send(one, signal.SIGKILL)


def raylet_killed(ray: RayCluster, folder: Path, figures: Figures) -> None:
    """2 x 2 x 2 on two nodes and a warm spare."""
    folder.mkdir()
    cluster = on_ray(ray, folder / "home", "bench=cube")
    try:
        spec = CUBE.format(pool="ray", spares=1, folder=folder / "checkpoints")
        job = cluster.submit(spec)
        cluster.wait_step(job, 10)
        nodes = cluster.client.get
        wait_for(lambda: sum(_warm(node) for node in nodes("/nodes")["nodes"]) == 3, "a warm spare", 0.5)
        cluster.wait_step(job, cluster.job(job)["progress"]["step"] + 3)
        attempt = cluster.job(job)["attempt"]
        wall = time.time()
        ray.kill(attempt["nodes"][1])

        def stepped() -> bool:
            now = cluster.job(job)["attempt"]
            return bool(now and now["number"] > attempt["number"] and now["first_step_at"])

        wait_for(stepped, "the next attempt's first step", 0.25)
        new = [point for point in points(cluster, job) if point["attempt"] > attempt["number"]]
        done = max(p["step"] for p in points(cluster, job) if p["attempt"] <= attempt["number"])
        first = min(new, key=lambda point: point["step"])
        figures.add("raylet_killed_s", first["at"] - wall, parts_of(timeline(cluster, job), wall))
        figures.replayed.append(max(0, done - first["step"] + 1))
        events = timeline(cluster, job)
        for event in events:
            if event["at"] >= wall:
                print(f"    {event['at'] - wall:7.3f} {event['kind']}: {event['text'][:150]}", flush=True)
        cluster.client.post(f"/jobs/{job}/cancel")
        cluster.wait_state(job, "cancelled")
    finally:
        cluster.close()


def _warm(node: dict[str, object]) -> bool:
    standbys = node.get("standbys")
    return isinstance(standbys, list) and any(one["state"] == "ready" for one in standbys)


def pairs(ray: RayCluster, folder: Path, figures: Figures, times: int) -> None:
    (folder / "local").mkdir()
    (folder / "on-ray").mkdir()
    local = KeepstepPair(folder / "local")
    try:
        on = RayPair(folder / "on-ray", ray)
        try:
            first_step(on.cluster, folder / "first", "submit_ray", figures, "pool=ray")
            for _ in range(times):
                local.fault("kill_2", figures)
                on.fault("kill_2", figures, "kill_2_ray")
        finally:
            on.cluster.close()
    finally:
        local.cluster.close()
    ray_train(ray, folder / "train", figures, times)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--times", type=int, default=5)
    options.add_argument("--only", choices=["pairs", "raylet"], help="one half of it")
    asked = options.parse_args()
    times = asked.times
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="keepstep-bench-") as name:
        folder = Path(name)
        ray = RayCluster(folder / "ray")
        try:
            if asked.only != "raylet":
                ray.add("p", 2, bench="pair")
                pairs(ray, folder, figures, times)
            if asked.only != "pairs":
                for node in ("a", "b", "c"):
                    ray.add(node, 4, bench="cube")
                raylet_killed(ray, folder / "cube", figures)
        finally:
            ray.close()
    medians = figures.medians()
    if asked.only != "raylet":
        medians["kill_vs_local"] = medians["kill_2_ray_s"] / medians["kill_2_s"]
        medians["kill_vs_ray_train"] = medians["kill_ray_train_s"] / medians["kill_2_ray_s"]
        medians["submit_vs_ray_train"] = medians["submit_ray_train_s"] / medians["submit_ray_s"]
    medians["steps_replayed_max"] = max(figures.replayed)
    context = {"times": times, "cores": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 1)}
    rounded = {name: round(value, 3) for name, value in sorted(medians.items())}
    print(json.dumps({"bench": "ray_pool", "figures": rounded, "context": context}))


if __name__ == "__main__":
    main()
