"""Bits that flip in a rank's memory, and batches that give nothing finite: who or what it was is found."""

from collections.abc import Callable

import pytest

from cluster import Cluster
from e2e.test_hung import PAIR, TRIO, faulty, recovered

Start = Callable[..., Cluster]
PROVED = 50  # the state is proved each so many steps


@pytest.mark.parametrize("where", ["weights", "owned", "moment"])
def test_a_flipped_bit_names_its_rank(start: Start, where: str) -> None:
    cluster = start(nodes=2, slots=1)
    job = faulty(cluster, f"flip {where}:1:{PROVED}")
    incident = recovered(cluster, job)
    assert (incident["verdict"], incident["culprit"]["rank"]) == ("lying", 1), incident
    told = {"weights": "gathered weights", "owned": "weights or moments", "moment": "weights or moments"}
    assert told[where] in incident["evidence"]["what"]
    restored = cluster.job(job)["attempt"]["parent"]["step"]
    assert restored < PROVED, "what came after the last proof is not to be trusted"


def test_a_replica_that_received_something_else_is_named(start: Start) -> None:
    """No state changes between two updates: one of three has other weights than its peers from the start."""
    cluster = start(nodes=1, slots=3)
    incident = recovered(cluster, job := faulty(cluster, f"flip received:1:{PROVED - 1}", TRIO))
    assert (incident["verdict"], incident["culprit"]["rank"]) == ("lying", 1), incident
    assert "differ from those of the other replicas" in incident["evidence"]["what"]
    assert cluster.job(job)["attempt"]["parent"]["step"] < PROVED


def test_a_batch_that_gives_nothing_finite_is_left_out(start: Start) -> None:
    cluster = start(nodes=2, slots=1)
    job = faulty(cluster, "nan:1:20")
    told = cluster.wait_state(job, "succeeded", "failed")
    assert told["state"] == "succeeded", cluster.story(job)
    incidents = cluster.incidents(job)
    assert [one["verdict"] for one in incidents] == ["lying", "lying"], cluster.story(job)
    assert [one["evidence"]["step"] for one in incidents] == [21, 21]
    assert "the batch is the cause" in incidents[1]["evidence"]["what"]


def test_batches_that_let_the_loss_jump_are_left_out(start: Start) -> None:
    """A file lost its content: three batches of nothing but zeros, and the loss jumps with the first."""
    cluster, first = start(nodes=2, slots=1), PROVED + 6
    spec = PAIR.replace("lr: 0.001, min_lr: 0.001", "lr: 0.01, min_lr: 0.01")
    fault = f"zeros:all:{first - 1}"
    job = faulty(cluster, f"{fault},{fault}", f"{spec}recovery: {{on_loss_spike: skip}}\n")
    told = cluster.wait_state(job, "succeeded", "failed")
    assert told["state"] == "succeeded", cluster.story(job)
    incidents = cluster.incidents(job)
    assert [one["verdict"] for one in incidents] == ["lying", "lying"], cluster.story(job)
    assert [one["evidence"]["step"] for one in incidents] == [first, first], incidents
    assert "tries the same batches again" in incidents[0]["evidence"]["what"]
    assert f"those of steps {first - 1}, {first} are the cause" in incidents[1]["evidence"]["what"]
    attempts = cluster.client.get(f"/jobs/{job}/attempts")["attempts"]
    assert [0 < one["parent"]["step"] < PROVED for one in attempts if one["number"] > 1] == [True, True]
    points = cluster.client.pages(f"/jobs/{job}/metrics", "points", limit=10_000)
    left_out = {one["step"] for one in points if one["attempt"] == 3 and one["loss"] is None}
    assert left_out == {first - 1, first}
