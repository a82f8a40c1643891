"""Ranks, agents, nodes and controllers are killed under a job; its loss curve must not know."""

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cluster import Cluster, Json
from keepstep.core.beacon import Phase
from keepstep.core.home import running_controller
from specs import CUBE, TINY

Start = Callable[..., Cluster]
Curve = Callable[[str], dict[int, float]]


def difference(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference of two loss curves, which must name the same steps."""
    assert sorted(one) == sorted(other)
    return max(abs(one[step] - other[step]) for step in one)


def after(attempt: int) -> Callable[[Json], bool]:
    """The job has begun another attempt."""
    return lambda told: told["attempt"]["number"] > attempt


@pytest.mark.long
def test_a_rank_killed_in_every_phase(start: Start, undisturbed: Curve) -> None:
    cluster = start(nodes=2, slots=4)
    job = cluster.submit(CUBE)
    phases = (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER, Phase.CHECKPOINT)
    for attempt, (phase, rank) in enumerate(zip(phases, (3, 0, 6, 5), strict=True), 1):
        cluster.wait_step(job, 6 + attempt, attempt=attempt)
        cluster.kill_in_phase(job, rank, phase, after_step=6 + attempt)
        cluster.wait(job, after(attempt))
    told = cluster.wait_state(job, "succeeded")
    assert told["attempt"]["number"] == 5
    assert difference(cluster.losses(job), undisturbed(CUBE)) == 0.0
    crashes = [incident["culprit"]["rank"] for incident in cluster.incidents(job)]
    assert crashes == [3, 0, 6, 5]


@pytest.mark.long
def test_the_controller_is_killed_under_training(start: Start, undisturbed: Curve) -> None:
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY)
    cluster.wait_step(job, 5)
    before = {rank: told["pid"] for rank, told in cluster.ranks(job).items()}
    cluster.kill_controller()
    cluster.start()
    cluster.wait(job, lambda _: len(cluster.ranks(job)) == 4)
    assert {rank: told["pid"] for rank, told in cluster.ranks(job).items()} == before
    told = cluster.wait_state(job, "succeeded")
    assert told["attempt"]["number"] == 1
    assert difference(cluster.losses(job), undisturbed(TINY)) == 0.0


def test_the_controller_is_killed_in_any_state_of_it(start: Start, undisturbed: Curve) -> None:
    """At whatever point of noticing, ending, deciding or starting it dies, the next one goes on."""
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY)
    seen = set()
    for attempt, at in enumerate(("ending", "ended", "preparing", "starting"), 1):
        cluster.wait_step(job, 4 + 2 * attempt, attempt=attempt)
        cluster.kill_rank(job, attempt % 4)
        seen.add(_kill_controller_when(cluster, job, at))
        cluster.start()
        cluster.wait(job, after(attempt))
    told = cluster.wait_state(job, "succeeded")
    assert told["attempt"]["number"] == 5
    assert len(seen) >= 2, seen
    assert difference(cluster.losses(job), undisturbed(TINY)) == 0.0


def _kill_controller_when(cluster: Cluster, job: str, state: str) -> str:
    """Kill -9 as soon as the newest attempt is past running and has come to `state` or beyond."""
    attempts = cluster.client.get(f"/jobs/{job}/attempts")["attempts"]
    number = attempts[-1]["number"]
    order = ["ending", "ended", "preparing", "starting", "running"]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        newest: Json = cluster.client.get(f"/jobs/{job}/attempts")["attempts"][-1]
        now = newest["state"]
        if (newest["number"] > number or now in {"ending", "ended"}) and order.index(now) >= order.index(
            state
        ):
            cluster.kill_controller()
            return str(now)
    raise AssertionError(f"the attempt after {number} never came to {state}")


def test_an_agent_is_killed_and_another_takes_over(start: Start, undisturbed: Curve) -> None:
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY)
    cluster.wait_step(job, 5)
    before = cluster.agent_pid("a")
    os.kill(before, signal.SIGKILL)
    cluster.wait(
        job, lambda _: cluster.client.get("/nodes/a")["connected"] and cluster.agent_pid("a") != before
    )
    told = cluster.wait_state(job, "succeeded")
    assert told["attempt"]["number"] == 1, "losing an agent must not cost an attempt"
    assert difference(cluster.losses(job), undisturbed(TINY)) == 0.0


def test_an_agent_is_upgraded(start: Start) -> None:
    """SIGTERM: the agent takes its leave, its ranks go on, the next one adopts them."""
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY)
    cluster.wait_step(job, 5)
    before = cluster.agent_pid("b")
    os.kill(before, signal.SIGTERM)
    cluster.wait(
        job, lambda _: cluster.client.get("/nodes/b")["connected"] and cluster.agent_pid("b") != before
    )
    told = cluster.wait_state(job, "succeeded")
    assert told["attempt"]["number"] == 1


@pytest.mark.long
def test_without_a_spare_the_job_shrinks_and_grows_back(start: Start, undisturbed: Curve) -> None:
    cluster = start(nodes=2, slots=2, return_after_s=3.0)
    job = cluster.submit(TINY, "run.llama.steps=400")
    cluster.wait_step(job, 6)
    cluster.lose_node("b")
    told = cluster.wait_step(job, 7, attempt=2)
    assert told["attempt"]["rung"] == "fewer replicas"
    assert told["layout"]["dp"] == 1
    assert told["attempt"]["nodes"] == ["a"]
    told = cluster.wait(
        job, lambda told: told["attempt"]["rung"] == "grow" and told["attempt"]["first_step_at"]
    )
    assert told["layout"]["dp"] == 2
    curve = undisturbed(TINY)
    assert max(abs(loss - curve[step]) for step, loss in cluster.losses(job).items() if step in curve) <= 1e-5


def test_a_suspended_controller_is_refused_after_a_takeover(start: Start) -> None:
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY)
    cluster.wait_step(job, 5)
    old = cluster.running
    _suspend(cluster)
    try:
        cluster.home.controller_file.unlink()
        new = cluster.start()
        assert new.pid != old.pid
        assert new.term > old.term
    finally:
        os.kill(old.pid, signal.SIGCONT)
    deadline = time.monotonic() + 30
    while _state(old.pid) != "Z":
        assert time.monotonic() < deadline, "the old controller goes on as if nothing had happened"
        time.sleep(0.05)
    now = running_controller(cluster.home)
    assert now is not None
    assert now.pid == new.pid
    assert cluster.wait_state(job, "succeeded")["attempt"]["number"] == 1


def _suspend(cluster: Cluster) -> None:
    """Stop the controller between two writes: whoever holds SQLite's lock cannot be overtaken, only ended."""
    deadline = time.monotonic() + 30
    while True:
        os.kill(cluster.running.pid, signal.SIGSTOP)
        cluster.until(lambda: _state(cluster.running.pid) == "T", "the controller to stop")
        with closing(sqlite3.connect(cluster.home.store_file, timeout=0, isolation_level=None)) as store:
            try:
                store.execute("BEGIN IMMEDIATE")
                store.execute("ROLLBACK")
                return
            except sqlite3.OperationalError:
                os.kill(cluster.running.pid, signal.SIGCONT)
                assert time.monotonic() < deadline, "it writes all the time"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


@pytest.mark.parametrize("verb", ["cancel", "suspend"])
def test_a_job_ends_when_its_owner_wants(start: Start, verb: str) -> None:
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY, "run.llama.steps=100000")
    cluster.wait_step(job, 3)
    cluster.client.post(f"/jobs/{job}/{verb}", {"reason": "test"})
    cluster.wait_state(job, {"cancel": "cancelled", "suspend": "suspended"}[verb])
    assert not [pid for pid, line in cluster.left_behind().items() if "keepstep.llama" in line]
    assert "is in memory only" not in cluster.story(job), "its ranks have saved what they had"
    if verb == "suspend":
        cluster.client.post(f"/jobs/{job}/resume")
        cluster.wait_step(job, 4, attempt=2)
