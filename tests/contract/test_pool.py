"""One suite for every pool: whoever brings the agents up, what runs on them behaves the same."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepstep.core.errors import Refused
from pool_benches import Bench, bench
from ray_cluster import RayCluster
from specs import TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # whole jobs through the life of a pool


@pytest.fixture(params=["local", "static", "ray"])
def on(
    request: pytest.FixtureRequest, tmp_path: Path, ray_cluster: Callable[[], RayCluster]
) -> Iterator[Bench]:
    with bench(request.param, tmp_path, ray_cluster) as made:
        yield made


def test_a_gang_trains_recovers_in_place_and_from_a_lost_node(on: Bench) -> None:
    """One job through a pool's whole life: a rank, an agent and a node are lost under it."""
    cluster = on.cluster
    job = cluster.submit(TINY, f"pool={on.pool}", "run.llama.steps=4000")
    cluster.wait_step(job, 3)
    assert cluster.job(job)["attempt"]["nodes"] == ["a", "b"]

    cluster.kill_rank(job, 3)
    told = cluster.wait_step(job, 4, attempt=2)
    assert (told["attempt"]["rung"], told["attempt"]["nodes"]) == ("in place", ["a", "b"])

    pids = {rank["pid"] for rank in cluster.ranks(job).values()}
    os.kill(cluster.agent_pid("a"), signal.SIGKILL)
    cluster.until(lambda: "a" not in cluster.connected(), "the agent to be missed")
    on.bring_back("a")
    cluster.until(lambda: len(cluster.ranks(job)) == 4 and "a" in cluster.connected(), "the agent to be back")
    cluster.until(lambda: all(rank["current"] for rank in cluster.ranks(job).values()), "its report")
    assert {rank["pid"] for rank in cluster.ranks(job).values()} == pids

    with pytest.raises(Refused, match="a node that talks is not lost"):
        cluster.client.post("/nodes/b/confirm-lost")
    on.lose("b")
    told = cluster.wait_step(job, 5, attempt=3)
    assert (told["attempt"]["rung"], told["attempt"]["nodes"]) == ("fewer replicas", ["a"]), cluster.story(
        job
    )
    assert cluster.incidents(job)[-1]["culprit"]["node"] == "b"

    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")


def test_a_cordoned_node_gets_no_work(on: Bench) -> None:
    cluster = on.cluster
    cluster.client.post("/nodes/a/cordon", {"reason": "smells"})
    job = cluster.submit(TINY, f"pool={on.pool}")
    told = cluster.wait(job, lambda told: "cordoned" in told["reason"])
    assert told["state"] == "queued"
    cluster.client.post("/nodes/a/uncordon")
    cluster.wait_step(job, 1)
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")
