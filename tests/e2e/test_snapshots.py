"""What jobs recover from when ranks, nodes, carriers and agents are killed: memory, not storage.

KEEPSTEP_TEST_KILLS: how many kills at random moments one job has to live through.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import Cluster, Json
from e2e.test_hung import TRIO, faulty
from specs import CUBE, TINY

KILLS = int(os.environ.get("KEEPSTEP_TEST_KILLS", "10"))
Start = Callable[..., Cluster]
Curve = Callable[[str], dict[int, float]]


def attempts(cluster: Cluster, job: str) -> list[Json]:
    found: list[Json] = cluster.client.get(f"/jobs/{job}/attempts")["attempts"]
    return sorted(found, key=lambda attempt: int(attempt["number"]))


def from_memory(attempt: Json) -> bool:
    return bool(attempt["restore"] and "memory" in attempt["restore"])


def protected(cluster: Cluster, job: str, step: int) -> int:
    """Until the loss of any node leaves this step; the step that it leaves by then."""
    told = cluster.wait(job, lambda told: told["memory"] and told["memory"]["protected_step"] >= step)
    return int(told["memory"]["protected_step"])


def replayed(cluster: Cluster, job: str) -> list[int]:
    """Steps that each attempt after the first did again, by the points that the one before has left."""
    points = cluster.client.pages(f"/jobs/{job}/metrics", "points", limit=10_000)
    done: dict[int, int] = {}
    for point in points:
        done[point["attempt"]] = max(done.get(point["attempt"], 0), point["step"])
    newest, found = 0, []
    for attempt in attempts(cluster, job):
        if attempt["number"] > 1:
            found.append(max(0, newest - int(attempt["parent"]["step"])))
        newest = max(newest, done.get(attempt["number"], 0))
    return found


def assert_equal(cluster: Cluster, job: str, curve: dict[int, float]) -> None:
    """Bitwise, wherever both have a point: one may die with its node, and a job may run past the curve."""
    both = curve.keys() & (mine := cluster.losses(job)).keys()
    assert both
    assert {step: mine[step] for step in both if mine[step] != curve[step]} == {}


def carrier_pid(cluster: Cluster, node: str, job: str) -> int:
    path = cluster.home.nodes / node / "carrier" / job / "carrier.json"
    return int(json.loads(path.read_bytes())["pid"])


@pytest.mark.timeout(900 + 60 * KILLS)
def test_kills_at_random_moments(start: Start, undisturbed: Curve) -> None:
    """While it steps, restores, meets; one rank or two at once. Nothing comes from storage."""
    cluster = start(nodes=2, slots=4)
    job = cluster.submit(CUBE, f"run.llama.steps={100 * KILLS}")
    chance = random.Random(KILLS)
    cluster.wait_step(job, 2)
    kills = 0
    while kills < KILLS:
        if chance.random() < 0.7:
            cluster.wait_state(job, "running")
            time.sleep(chance.uniform(0.0, 0.6))
        else:  # wherever the recovery from the last kill is by now
            time.sleep(chance.uniform(0.0, 1.5))
        hit = [_kill(cluster, job, rank) for rank in chance.sample(range(8), chance.choice((1, 1, 2)))]
        kills += any(hit)
    told = cluster.wait_state(job, "running")
    newest = int(told["attempt"]["number"])
    last = cluster.wait_step(job, told["progress"]["step"] + 3, attempt=newest)["progress"]["step"]
    cluster.client.post(f"/jobs/{job}/cancel", {"reason": "killed often enough"})
    cluster.wait_state(job, "cancelled")
    tried = attempts(cluster, job)[1:]
    print(f"{kills} kills, {len(tried)} recoveries, {last} steps")
    assert len(tried) >= KILLS // 2, "kills of one recovery count once"
    assert [attempt["number"] for attempt in tried if not from_memory(attempt)] == []
    assert max(replayed(cluster, job)) <= 1
    losses = cluster.losses(job)
    curve = undisturbed(CUBE.replace("steps: 60", f"steps: {max(losses)}"))
    assert losses == curve


def _kill(cluster: Cluster, job: str, rank: int) -> bool:
    """Whether there was a process to kill."""
    pid = int(cluster.ranks(job).get(rank, {}).get("pid") or 0)
    if not pid:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def test_a_lost_nodes_states_come_from_its_buddy(start: Start, undisturbed: Curve) -> None:
    cluster = start(nodes=3, slots=2)
    job = cluster.submit(TINY, "resources.spares=1")
    cluster.wait_step(job, 6)
    assert cluster.job(job)["attempt"]["spares"] == ["c"]
    cluster.lose_node("a")
    told = cluster.wait_step(job, 7, attempt=2)
    assert told["attempt"]["rung"] == "spare"
    assert set(told["attempt"]["nodes"]) == {"b", "c"}
    assert from_memory(told["attempt"])
    assert "2 of 4 as buddies' copies" in told["attempt"]["reason"]
    cluster.wait_state(job, "succeeded")
    assert_equal(cluster, job, undisturbed(TINY))


def test_a_gang_on_one_node_has_its_copies_on_an_idle_spare(start: Start, undisturbed: Curve) -> None:
    cluster = start(nodes=2, slots=4)
    changes = "resources.nodes=1", "resources.gpus_per_node=4", "resources.spares=1", "run.llama.steps=2000"
    job = cluster.submit(TINY, *changes, "checkpoint.every=1000 steps")
    told = cluster.wait_step(job, 6)
    [node], [spare] = told["attempt"]["nodes"], told["attempt"]["spares"]
    before = protected(cluster, job, 7)
    cluster.lose_node(node)
    told = cluster.wait_step(job, before, attempt=2)
    assert from_memory(told["attempt"]), cluster.story(job)
    assert told["attempt"]["nodes"] == [spare]
    assert told["attempt"]["restore"]["step"] >= before
    cluster.client.post(f"/jobs/{job}/cancel", {"reason": "test"})
    cluster.wait_state(job, "cancelled")
    assert_equal(cluster, job, undisturbed(TINY))


def test_a_smaller_gang_begins_from_memory(start: Start, undisturbed: Curve) -> None:
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY, "run.llama.steps=2000", "checkpoint.every=1000 steps")
    before = protected(cluster, job, 6)
    cluster.lose_node("b")
    told = cluster.wait_step(job, before + 1, attempt=2)
    assert told["layout"]["dp"] == 1
    assert from_memory(told["attempt"]), cluster.story(job)
    assert told["attempt"]["restore"]["step"] >= before
    cluster.kill_rank(job, 1)
    told = cluster.wait(job, lambda told: told["attempt"]["number"] > 2)
    assert from_memory(told["attempt"]), "the smaller gang keeps its own"
    cluster.wait_step(job, told["attempt"]["restore"]["step"] + 3, attempt=3)
    cluster.client.post(f"/jobs/{job}/cancel", {"reason": "seen enough"})
    cluster.wait_state(job, "cancelled")
    assert_equal(cluster, job, undisturbed(TINY))


@pytest.mark.long
def test_a_killed_carrier_is_replaced_while_ranks_go_on(start: Start, undisturbed: Curve) -> None:
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY, "run.llama.steps=2000", "checkpoint.every=1000 steps")
    cluster.wait_step(job, 4)
    before = carrier_pid(cluster, "a", job)
    os.kill(before, signal.SIGKILL)
    cluster.until(lambda: carrier_pid(cluster, "a", job) != before, "another carrier")
    step = cluster.job(job)["progress"]["step"]
    told = cluster.wait_step(job, step + 150)
    assert told["attempt"]["number"] == 1, "losing a carrier must not cost an attempt"
    cluster.kill_rank(job, 0)
    told = cluster.wait(job, lambda told: told["attempt"]["number"] == 2)
    assert from_memory(told["attempt"])
    assert "4 of 4 ranks in place" in told["attempt"]["reason"]
    cluster.wait(job, lambda told: told["attempt"]["first_step_at"])
    curve = undisturbed(TINY)
    cluster.client.post(f"/jobs/{job}/cancel", {"reason": "test"})
    cluster.wait_state(job, "cancelled")
    losses = cluster.losses(job)
    assert {step: loss for step, loss in losses.items() if step in curve and loss != curve[step]} == {}


@pytest.mark.long
def test_an_agents_death_leaves_snapshots_where_they_are(start: Start, undisturbed: Curve) -> None:
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY, "run.llama.steps=200")
    cluster.wait_step(job, 4)
    before = cluster.agent_pid("a")
    carrier = carrier_pid(cluster, "a", job)
    os.kill(before, signal.SIGKILL)
    cluster.kill_rank(job, 2)
    told = cluster.wait(job, lambda told: told["attempt"]["number"] == 2)
    assert from_memory(told["attempt"])
    assert carrier_pid(cluster, "a", job) == carrier
    cluster.wait_state(job, "succeeded")
    curve = undisturbed(TINY)
    losses = cluster.losses(job)
    assert {step: loss for step, loss in losses.items() if step in curve and loss != curve[step]} == {}


SCRIPT = """
name: kept
resources: {{nodes: 2, gpus_per_node: 1}}
run: {{command: [{python}, {script}, "40", "{kill_at}"], workdir: {folder}, ship: none}}
checkpoint: {{snapshot_every: 1 step}}
"""


@pytest.mark.parametrize("script", ["kept.py", "kept_sharded.py"])
def test_a_script_goes_on_from_memory_alone(start: Start, script: str) -> None:
    cluster = start(nodes=2, slots=1)
    folder = Path(__file__).parent / "scripts"
    said = []
    for kill_at in (0, 25):
        job = cluster.submit(
            SCRIPT.format(python=sys.executable, script=script, folder=folder, kill_at=kill_at)
        )
        cluster.wait_state(job, "succeeded")
        logs = (path.read_text() for path in cluster.home.nodes.glob(f"*/jobs/{job}/*/rank-0.log"))
        said += [line for log in logs for line in log.splitlines() if line.startswith("started at")]
    assert said[0].startswith("started at 0, ")
    assert said[1].startswith("started at 24, ")
    assert said[0].split("weights")[1] == said[1].split("weights")[1]


def test_a_node_that_is_drained_leaves_what_only_it_has_in_storage(start: Start, undisturbed: Curve) -> None:
    """Its ranks have no time to save anything, and nobody has copies."""
    cluster = start(nodes=2, slots=4, return_after_s=120.0)
    changes = "resources.nodes=1", "resources.gpus_per_node=4", "run.llama.steps=2000", "run.stop.grace=0s"
    job = cluster.submit(TINY, *changes, "checkpoint.every=1000 steps")
    [node] = cluster.wait_step(job, 6)["attempt"]["nodes"]
    os.kill(cluster.agent_pid(node), signal.SIGINT)
    told = cluster.wait_step(job, 7, attempt=2)
    assert told["attempt"]["nodes"] != [node]
    assert not from_memory(told["attempt"]), cluster.story(job)
    assert told["attempt"]["restore"]["step"] >= 6, cluster.story(job)
    assert max(replayed(cluster, job)) <= 1
    cluster.client.post(f"/jobs/{job}/cancel", {"reason": "test"})
    cluster.wait_state(job, "cancelled")
    assert_equal(cluster, job, undisturbed(TINY))


def test_a_suspended_script_comes_back_from_what_was_stored_of_its_memory(start: Start) -> None:
    cluster = start(nodes=2, slots=1)
    folder = Path(__file__).parent / "scripts"
    spec = SCRIPT.format(python=sys.executable, script="kept.py", folder=folder, kill_at=0).replace(
        '"40"', '"100000"'
    )
    job = cluster.submit(spec, f"checkpoint.dir={cluster.home.path}/stored")
    cluster.wait_step(job, 20)
    cluster.client.post(f"/jobs/{job}/suspend", {"reason": "test"})
    cluster.wait_state(job, "suspended")
    cluster.until(lambda: not list(cluster.home.nodes.glob(f"*/carrier/{job}/*.sock")), "carriers to end")
    cluster.client.post(f"/jobs/{job}/resume", {"reason": "test"})
    told = cluster.wait_step(job, 21, attempt=2)
    assert told["attempt"]["restore"], cluster.story(job)
    assert not from_memory(told["attempt"])
    assert int(told["attempt"]["restore"]["step"]) >= 20
    logs = cluster.home.nodes.glob(f"*/jobs/{job}/2/rank-0.log")
    began = [line for log in logs for line in log.read_text().splitlines() if line.startswith("goes on")]
    assert began == [f"goes on from {told['attempt']['restore']['step']}"]


@pytest.mark.long
def test_a_corrupt_state_without_a_copy_gives_way_to_the_one_before(start: Start) -> None:
    """A bit of the newest flips in memory, and its rank dies; there is no buddy that could have a copy."""
    cluster = start(nodes=1, slots=3)
    job = faulty(cluster, "flip kept:1:20", TRIO.replace("every: 5 steps", "every: 1000 steps"))
    told = cluster.wait_state(job, "succeeded", "failed")
    assert told["state"] == "succeeded", cluster.story(job)
    assert from_memory(told["attempt"]), cluster.story(job)
    assert told["attempt"]["restore"]["step"] in {18, 19}, cluster.story(job)
    assert "is not in memory any more" in cluster.story(job)
    undisturbed = cluster.submit(TRIO)
    cluster.wait_state(undisturbed, "succeeded")
    assert_equal(cluster, job, cluster.losses(undisturbed))


def test_never_means_never(start: Start) -> None:
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY, "checkpoint.snapshot_every=never")
    cluster.wait_step(job, 6)
    assert not list(cluster.home.nodes.glob(f"*/carrier/{job}"))
    cluster.kill_rank(job, 0)
    told = cluster.wait_step(job, 7, attempt=2)
    assert told["attempt"]["restore"]
    assert not from_memory(told["attempt"])


@pytest.mark.long
def test_what_only_memory_has_outlives_all_of_its_holders(start: Start, undisturbed: Curve) -> None:
    """A job that has to wait for a node stores what the other one holds; then that one is lost, too."""
    cluster = start(nodes=2, slots=2, return_after_s=3.0)
    job = cluster.submit(TINY, "elastic.min_dp=2", "checkpoint.every=1000 steps")
    before = protected(cluster, job, 6)
    cluster.lose_node("a")
    cluster.wait_state(job, "queued")
    cluster.lose_node("b")
    told = cluster.wait_step(job, 7, attempt=2)
    story = cluster.story(job)
    assert not from_memory(told["attempt"]), story
    assert told["attempt"]["restore"]["step"] >= before, story
    cluster.wait_state(job, "succeeded")
    assert_equal(cluster, job, undisturbed(TINY))


def test_a_suspended_job_keeps_what_its_ranks_could_not_save(start: Start, undisturbed: Curve) -> None:
    cluster = start(nodes=2, slots=2)
    job = cluster.submit(TINY, "checkpoint.every=1000 steps", "run.stop.grace=0s")
    cluster.wait_step(job, 6)
    cluster.client.post(f"/jobs/{job}/suspend", {"reason": "test"})
    cluster.wait_state(job, "suspended")
    assert "is stored from memory" in cluster.story(job)
    cluster.until(lambda: not list(cluster.home.nodes.glob(f"*/carrier/{job}")), "carriers to end")
    cluster.client.post(f"/jobs/{job}/resume", {"reason": "test"})
    told = cluster.wait_step(job, 7, attempt=2)
    assert not from_memory(told["attempt"])
    assert max(replayed(cluster, job)) <= 1
    cluster.wait_state(job, "succeeded")
    assert_equal(cluster, job, undisturbed(TINY))
