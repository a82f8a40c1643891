"""Ranks that are held up in one way after another, and a machine that sleeps: nobody is ended for it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import Cluster, Json
from e2e.test_hung import PAIR, faulty

# Enough to compute that a processor which is lacking is felt, and steps for as long as it takes.
BUSY = PAIR.replace("dim: 32", "dim: 128").replace("ffn_dim: 64", "ffn_dim: 512")
BUSY = BUSY.replace("steps: 60", "steps: 9999").replace("every: 5 steps", "every: 10000 steps")

NICE = 5  # a quarter of what its equal gets
# More than the bound of any gang that stands; by hand also 60.
ASLEEP_S = float(os.environ.get("KEEPSTEP_TEST_ASLEEP_S", "16"))


@pytest.mark.slow
def test_what_holds_a_rank_up_is_told_apart(start: Callable[..., Cluster]) -> None:
    cluster = start(nodes=2, slots=1)
    job = faulty(cluster, "asked:1:0", BUSY)
    cluster.wait_step(job, 10)
    asked = cluster.home.path / "asked"
    for what in ("data", "gc"):
        asked.write_text(what)
        found = told(cluster, job, what)
        assert (found["rank"], found["confidence"]) == (1, 0.9), found
    asked.unlink()
    with beside(int(cluster.ranks(job)[1]["pid"])):
        found = told(cluster, job, "node 1")
    assert (found["rank"], found["node"]) == (1, cluster.ranks(job)[1]["node"]), found
    assert "waiting for a processor" in found["what"], found
    assert 0.05 < found["slowdown"] < 1.0, found
    step = cluster.job(job)["progress"]["step"]
    sleep_all(cluster, ASLEEP_S)
    cluster.wait_step(job, step + 30)
    assert cluster.job(job)["attempt"]["number"] == 1 and not cluster.incidents(job), cluster.story(job)


def told(cluster: Cluster, job: str, cause: str) -> Json:
    """The first finding of this cause."""
    found: list[Json] = []

    def seen() -> bool:
        events = cluster.client.pages("/events", "events", limit=200, job=job)
        verdicts = [one["data"]["verdict"] for one in events if one["kind"] == "found"]
        found[:] = [one for one in verdicts if one["signature"].startswith(f"slow: {cause}")]
        return bool(found)

    cluster.until(seen, f"'slow: {cause}' to be told\n{cluster.story(job)}", within_s=60)
    return found[0]


def sleep_all(cluster: Cluster, seconds: float) -> None:
    """Everything of keepstep stops as if the machine were suspended, and goes on in any order."""
    pids = sorted({*cluster.left_behind(), cluster.running.pid})
    assert len(pids) > 6, "controller, agents, standby servers, shims, carriers, ranks"
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)  # it is this time that must not count
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def beside(pid: int) -> Iterator[None]:
    """A rank and a hog share one processor. The rank gives way: it is felt where all are starved, too."""
    core = {max(os.sched_getaffinity(0))}
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), core)
        os.setpriority(os.PRIO_PROCESS, int(task.name), NICE)
    session = Path(f"/proc/{pid}/autogroup")  # where there are any, only their priorities count
    if session.exists():
        session.write_text(f"{NICE}")
    hog = subprocess.Popen((sys.executable, "-c", "while True: pass"), start_new_session=True)
    try:
        os.sched_setaffinity(hog.pid, core)
        yield
    finally:
        hog.kill()
        hog.wait()
