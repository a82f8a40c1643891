"""What people see of a job's time while it trains, and what is kept of it."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from cluster import Cluster
from specs import TINY

Start = Callable[..., Cluster]
PARTS = {"data", "forward", "backward", "optimizer", "communication", "bubble"}


def test_where_the_time_goes_is_shown_and_kept(start: Start) -> None:
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY, "parallelism.tp=1", "parallelism.pp=2", "run.llama.steps=100000")
    told = cluster.wait(job, lambda told: min(told["progress"]["time"].values(), default=0.0) > 0)
    time = told["progress"]["time"]
    assert set(time) == PARTS
    assert sum(time.values()) == pytest.approx(1.0)
    shown = subprocess.run(
        [sys.executable, "-m", "keepstep.cli.main", "top", "--once"],
        env={**os.environ, "KEEPSTEP_HOME": str(cluster.home.path)},
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    lines = [line.split() for line in shown.splitlines()]
    at = next(number for number, line in enumerate(lines) if "BUBBLE" in line)
    columns, figures = lines[at : at + 2]
    assert set(columns[1:]) == {part.upper() for part in PARTS}
    assert figures[0] == job and 95 <= sum(int(share.rstrip("%")) for share in figures[1:]) <= 105, shown
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")
    events = cluster.client.pages("/events", "events", limit=200, job=job)
    (spent,) = (event for event in events if event["kind"] == "spent")
    assert spent["text"].startswith("time in steps: data ") and " bubble " in spent["text"]
