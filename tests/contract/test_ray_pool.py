"""What can happen to a job on Ray beside what can happen on every pool: Ray's own parts die, drain or refuse.

One cluster for all, a controller for those that go well together; the last test takes the head away.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from cluster import Cluster, Json
from keepstep.cli import service
from keepstep.cli.rayed import RayOptions
from keepstep.core.errors import Unreachable
from keepstep.core.home import Home, running_controller
from keepstep.pools.ray.words import Seen, Wanted, WantedAgent, WantedGroup
from keepstep.spec import load, to_dict
from ray_cluster import RayCluster
from specs import TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ACTOR = Path(__file__).parents[2] / "deploy" / "ray" / "controller_actor.py"
NODES = ("n1", "n2", "n3")
ONE = """
name: one
resources: {{nodes: 1, gpus_per_node: 1}}
run: {{command: [python, -c, "print('leaves with {code}'); raise SystemExit({code})"], ship: none}}
recovery: {{restarts: {{max: 0}}}}
"""


@pytest.fixture(scope="module")
def ray(ray_cluster: Callable[[], RayCluster]) -> RayCluster:
    cluster = ray_cluster()
    for node in NODES:
        cluster.add(node, 2, bench="faults")
    return cluster


def options(ray: RayCluster, home: Path, address: str = "") -> RayOptions:
    return RayOptions(
        address=address or ray.address,
        resource=ray.resource,
        labels=("bench=faults",),
        folder=str(home / "nodes"),
    )


def begin(ray: RayCluster, folder: Path, address: str = "") -> Cluster:
    home = folder / "home"
    return Cluster(home, nodes=0, slots=2, ray=options(ray, home, address))


@pytest.fixture(scope="module")
def cluster(ray: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = begin(ray, tmp_path_factory.mktemp("faults"))
    made.until(lambda: set(known(made)) >= set(NODES), "Ray's nodes to be known")
    yield made
    ray.close()  # first: without its head nobody but the raylets ends what Ray keeps
    made.close()


def known(cluster: Cluster) -> list[str]:
    return [node["name"] for node in cluster.client.get("/nodes")["nodes"]]


def nothing_left(ray: RayCluster) -> None:
    left = [*ray.actors(), *ray.groups()]

    def gone() -> bool:
        left[:] = [*ray.actors(), *ray.groups()]
        return not left

    try:
        ray.until(gone, "actors and groups to be removed")
    except AssertionError as late:
        raise AssertionError(f"{late}: {left}") from None


def driver_of(cluster: Cluster) -> int:
    """Its process id; 0 while there is none."""
    children = psutil.Process(cluster.running.pid).children()
    running = [one for one in children if one.status() != psutil.STATUS_ZOMBIE]
    return next((int(one.pid) for one in running if "keepstep.pools.ray.driver" in one.cmdline()), 0)


def kinds(cluster: Cluster, kind: str) -> list[Json]:
    events = cluster.client.pages("/events", "events", limit=1000)
    return [event for event in events if event["kind"] == kind]


def test_what_cannot_be_placed_says_why_and_is_demand(
    ray: RayCluster, cluster: Cluster, tmp_path: Path
) -> None:
    """Also: two controllers on one cluster, one of them from outside, do not touch each other's."""
    large = TINY.replace("nodes: 2, gpus_per_node: 2", "nodes: 5, gpus_per_node: 2").replace("dp: 2", "dp: 5")
    large = large.replace("global_tokens: 512", "global_tokens: 640")
    job = cluster.submit(large, "pool=ray")
    told = cluster.wait(job, lambda job: "Ray is asked for 5 whole nodes" in job["reason"])
    assert "3 of 3 nodes can be had, bench=faults (n1, n2, n3)" in told["reason"]
    assert "resources.nodes up to 3 would fit now" in told["reason"]
    asked = {ray.resource: 2.0}
    ray.until(lambda: ray.demand() and ray.demand()[0]["bundles"] == [asked] * 5, "the gang as demand")

    other = begin(ray, tmp_path, address=ray.client_address)
    try:
        job_too = other.submit(large, "pool=ray")
        ray.until(lambda: len(ray.groups()) == 2, "the other controller's group")
        owners = {group["name"].split("/")[1] for group in ray.groups()}
        assert len(owners) == 2
        other.client.post(f"/jobs/{job_too}/cancel")
        ray.until(lambda: len(ray.groups()) == 1, "its own group to be removed")
    finally:
        other.close()
    assert [group["name"].split("/")[2] for group in ray.groups()] == [job]
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")
    nothing_left(ray)


def test_a_cluster_that_is_gone_or_of_another_version_is_named(
    ray: RayCluster, cluster: Cluster, tmp_path: Path
) -> None:
    before = ray.set_version("2.49.0")
    driver = driver_of(cluster)
    try:
        os.kill(driver, signal.SIGKILL)
        job = cluster.submit(TINY, "pool=ray")
        told = cluster.wait(job, lambda job: "ersion mismatch" in job["reason"])
        assert "does not answer" in told["reason"]
    finally:
        ray.set_version(before)
    cluster.until(lambda: kinds(cluster, "ray back"), "the driver to connect again")
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")

    checks = doctor(ray, ray.resource, "http://127.0.0.1:9")
    assert checks["ray cluster"]["state"] == checks["ray versions"]["state"] == "ready", checks
    assert checks["ray to controller"]["state"] == "failed"
    told = checks["ray to controller"]["told"]
    assert "http://127.0.0.1:9 is not reached" in told and "n1: [Errno 111]" in told
    assert "no node declares GPU; they declare CPU" in doctor(ray, "GPU")["ray resources"]["told"]

    gone = begin(ray, tmp_path / "gone", address="127.0.0.1:9")
    try:
        job = gone.submit(TINY, "pool=ray")
        told = gone.wait(job, lambda job: "does not answer" in job["reason"])
        assert told["state"] == "queued"
        assert "127.0.0.1:9" in told["reason"]
    finally:
        gone.close()


def doctor(ray: RayCluster, resource: str, url: str = "") -> dict[str, Json]:
    asked = ["--ray", ray.address, "--ray-resource", resource, "--ray-url", url, "-o", "json"]
    command = [sys.executable, "-m", "keepstep.cli.main", "doctor", *asked]
    done = subprocess.run(command, capture_output=True, check=False, timeout=200)
    return {check["what"]: check for check in json.loads(done.stdout)["checks"]}


def test_what_arrives_is_used_what_is_used_is_not_idle_and_nothing_stays(
    ray: RayCluster, cluster: Cluster
) -> None:
    ray.add("late1", 1, bench="faults", rack="late")
    spread = TINY.replace("gpus_per_node: 2", "gpus_per_node: 1, labels: {rack: late}").replace(
        "tp: 2", "tp: 1"
    )
    job = cluster.submit(spread, "pool=ray", "run.llama.steps=100000")
    cluster.wait(job, lambda job: "1 of 1 nodes can be had, bench=faults, rack=late (late1)" in job["reason"])
    ray.until(lambda: ray.demand() and ray.demand()[0]["bundles"] == [{ray.resource: 1.0}] * 2, "demand")
    ray.add("late2", 1, bench="faults", rack="late")
    told = cluster.wait_step(job, 3)
    assert set(told["attempt"]["nodes"]) == {"late1", "late2"}
    assert all("no longer idle" in ray.scale_down(node) for node in told["attempt"]["nodes"])
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")
    nothing_left(ray)

    cluster.client.post("/nodes/late2/drain", {"reason": "its fans rattle"})
    ray.until(lambda: not ray.nodes()["late2"], "Ray to end what was drained, once it is empty")
    cluster.until(lambda: kinds(cluster, "ray node dead"), "its death to be told")
    assert "AUTOSCALER_DRAIN_PREEMPTED" in kinds(cluster, "ray node dead")[-1]["text"]
    ray.terminate("late1")

    for code, state in (("0", "succeeded"), ("3", "failed")):
        job = cluster.submit(ONE.format(code=code), "pool=ray")
        # Followed, since with the job its agents go, and then nobody can be asked.
        said = [line.get("line") for line in cluster.client.lines(f"/jobs/{job}/logs", follow=True)]
        assert f"leaves with {code}" in said
        cluster.wait_state(job, state)
        nothing_left(ray)


def test_a_controller_may_be_an_actor(ray: RayCluster, tmp_path: Path) -> None:
    """As deploy/ray has it: begun, killed and begun again by Ray, stopped; a job is done before and after."""
    home = Home(path=tmp_path / "home")
    terms = ["--ray-resource", ray.resource, "--ray-label", "bench=faults", "--ray-dir", str(home.nodes)]
    assert as_actor(ray, str(home.path), "0", *terms) == "runs\n"

    def up(than: int = 0) -> int:
        running = running_controller(home)
        if running is None or running.pid == than:
            return 0
        try:
            service.client(running).get("/nodes")
        except Unreachable:  # it is just coming up
            return 0
        return running.pid

    def does_a_job() -> None:
        running = running_controller(home)
        assert running is not None
        client = service.client(running)
        spec = to_dict(load(ONE.format(code="0"), "test.yaml", ("pool=ray",), base_dir=home.path))
        job = client.post("/jobs", {"spec": spec})["id"]
        ray.until(lambda: client.get(f"/jobs/{job}")["state"] == "succeeded", "the job's end", 240.0)

    try:
        ray.until(up, "the controller", 240.0)
        does_a_job()
        killed = up()
        os.kill(killed, signal.SIGKILL)
        ray.until(lambda: up(killed), "Ray to begin it again", 240.0)
        does_a_job()
        last = psutil.Process(up())
    finally:
        assert as_actor(ray, str(home.path), "0", "stop") == "stopped\n"
    last.wait(30)
    ray.until(lambda: not ray.actors() and not ray.groups(), "nothing to be left")


def as_actor(ray: RayCluster, *arguments: str) -> str:
    command = [sys.executable, str(ACTOR), *arguments]
    environment = {**os.environ, "RAY_ADDRESS": ray.address, "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True).stdout


def test_what_a_controller_left_goes_with_its_last_agent(ray: RayCluster, tmp_path: Path) -> None:
    """One that never comes back; and one that was suspended does nothing once another has taken over."""
    prefix = "keepstep/lost/"
    driver = started(ray, prefix, 1)
    assert driver.stdin is not None and driver.stdout is not None
    try:
        group = WantedGroup(
            name=f"{prefix}j/gang-1", bundles=2, resources={ray.resource: 2.0}, selector={"bench": "faults"}
        )
        driver.stdin.write(msgspec.json.encode(Wanted(groups=(group,))) + b"\n")
        driver.stdin.flush()
        seen = Seen()
        while not (seen.groups and seen.groups[0].state == "CREATED"):
            seen = msgspec.json.decode(driver.stdout.readline(), type=Seen)
            assert not seen.problem
        agents = tuple(
            WantedAgent(
                actor=f"{group.name}/{index}@x", group=group.name, bundle=index, ray_node=node,
                resources=group.resources, node=f"lost{index}", folder=str(tmp_path / f"lost{index}"),
                arguments=("--pool", "ray", "--slots", "1", "--exit-when-orphaned", "1"),
                endpoint=json.dumps({"url": "http://127.0.0.1:9", "token": "none"}),
            )
            for index, node in enumerate(seen.groups[0].nodes)
        )  # fmt: skip
        driver.stdin.write(msgspec.json.encode(Wanted(groups=(group,), agents=agents)) + b"\n")
        driver.stdin.flush()
        ray.until(lambda: len(ray.actors()) == 2, "both actors")
        newer = started(ray, prefix, 2)
        assert newer.stdin is not None
        try:
            newer.stdin.write(msgspec.json.encode(Wanted(groups=(group,), agents=agents)) + b"\n")
            newer.stdin.flush()
            while not seen.problem:
                seen = msgspec.json.decode(driver.stdout.readline(), type=Seen)
            assert "a controller of term 2 has taken over from term 1" in seen.problem
        finally:
            ended(newer)
    finally:
        ended(driver)
    nothing_left(ray)


def started(ray: RayCluster, prefix: str, term: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "keepstep.pools.ray.driver", ray.address, prefix, str(term)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def ended(driver: "subprocess.Popen[bytes]") -> None:
    driver.kill()
    driver.wait(30)
    for pipe in (driver.stdin, driver.stdout):
        assert pipe is not None
        pipe.close()


def test_a_gang_outlives_controller_driver_actor_and_raylet(ray: RayCluster, cluster: Cluster) -> None:
    """One job through all of it, on two nodes and a spare."""
    job = cluster.submit(TINY, "pool=ray", "resources.spares=1", "run.llama.steps=100000")
    ray.until(ray.groups, "its group")
    cluster.kill_controller()  # in the middle of the placement
    cluster.start()
    told = cluster.wait_step(job, 3)
    cluster.until(lambda: len(cluster.connected()) == 3, "the spare's agent")
    assert told["attempt"]["number"] == 1
    assert {group["name"].rpartition("/")[2] for group in ray.groups()} == {"gang-1", "extra-1"}
    actors = {actor["name"]: actor["pid"] for actor in ray.actors()}
    assert len(actors) == 3

    driver = driver_of(cluster)
    os.kill(driver, signal.SIGKILL)
    cluster.until(lambda: driver_of(cluster) not in {0, driver}, "another driver")
    cluster.kill_controller()
    cluster.start()
    cluster.until(lambda: len(cluster.connected()) == 3, "the agents to be back")
    cluster.wait_step(job, cluster.job(job)["progress"]["step"] + 3)
    assert cluster.job(job)["attempt"]["number"] == 1, cluster.story(job)
    assert {actor["name"]: actor["pid"] for actor in ray.actors()} == actors

    node = told["attempt"]["nodes"][1]
    os.kill(next(actor["pid"] for actor in ray.actors() if actor["node"] == node), signal.SIGKILL)
    told = cluster.wait_step(job, 5, attempt=2)
    cluster.until(lambda: len(cluster.connected()) == 3, "an actor in the same bundle")
    cluster.until(lambda: ready(cluster) == 3, "the new spare to be warm")
    assert len(ray.groups()) == 2

    lost, killed_at = told["attempt"]["nodes"][1], time.time()
    spare = (set(NODES) - set(told["attempt"]["nodes"])).pop()
    number = told["attempt"]["number"]
    ray.kill(lost)
    told = cluster.wait_step(job, 5, attempt=number + 1)
    assert spare in told["attempt"]["nodes"], cluster.story(job)
    assert "is whole in memory" in placed(cluster, job)
    assert cluster.incidents(job)[-1]["culprit"]["node"] == lost
    print(f"raylet killed, next step after {told['attempt']['first_step_at'] - killed_at:.1f} s")
    cluster.until(
        lambda: "UNEXPECTED_TERMINATION" in newest(cluster, "ray node dead"), "Ray's own word of it"
    )

    left = told["attempt"]["nodes"][0]
    number = told["attempt"]["number"]
    drained_at = time.time()
    ray.drain(left, 10.0)
    told = cluster.wait_step(job, 5, attempt=number + 1)
    assert left not in told["attempt"]["nodes"], cluster.story(job)
    assert told["attempt"]["rung"] == "fewer replicas"
    dead = next(event for event in kinds(cluster, "dead") if event["attempt"] == number)
    assert dead["at"] - drained_at < 10.0
    done = max(p["step"] for p in points(cluster, job) if p["attempt"] <= number)
    assert not killed_by_us(cluster, job, after=drained_at), cluster.story(job)  # they saved their state
    first = min(p["step"] for p in points(cluster, job) if p["attempt"] > number)
    assert first == done + 1  # nothing is done again

    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")
    nothing_left(ray)


@pytest.mark.long
def test_without_its_head_the_gang_trains_on_and_what_comes_back_is_told_apart(
    ray: RayCluster, cluster: Cluster
) -> None:
    """With what it knew, it is the same cluster. Without, all of it is begun anew. The last test."""
    one = TINY.replace("nodes: 2", "nodes: 1").replace("dp: 2", "dp: 1")
    job = cluster.submit(one, "pool=ray", "run.llama.steps=100000")
    cluster.wait_step(job, 3)
    actors, lost = ray.actors(), len(kinds(cluster, "ray lost"))
    ray.kill_head()
    cluster.until(lambda: len(kinds(cluster, "ray lost")) > lost, "the timeline to say it")
    assert "What runs goes on" in kinds(cluster, "ray lost")[-1]["text"]
    cluster.wait_step(job, cluster.job(job)["progress"]["step"] + 3)
    ray.restart_head()
    cluster.until(lambda: "the same cluster: 1 agents" in newest(cluster, "ray back"), "it to be known again")
    told = cluster.wait_step(job, cluster.job(job)["progress"]["step"] + 3)
    assert told["attempt"]["number"] == 1
    assert ray.actors() == actors

    lost = len(kinds(cluster, "ray lost"))
    ray.kill_head()
    cluster.until(lambda: len(kinds(cluster, "ray lost")) > lost, "the second loss")
    ray.restart_head(anew=True)
    ray.add("new", 2, bench="faults")
    cluster.until(lambda: "as another cluster" in newest(cluster, "ray back"), "it to be told apart")
    told = cluster.wait_step(job, 5, attempt=2)
    assert told["attempt"]["nodes"] == ["new"], cluster.story(job)
    number = told["attempt"]["number"]
    assert min(p["step"] for p in points(cluster, job) if p["attempt"] == number) > 1  # from what was stored
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")
    nothing_left(ray)


def newest(cluster: Cluster, kind: str) -> str:
    found = kinds(cluster, kind)
    return str(found[-1]["text"]) if found else ""


def ready(cluster: Cluster) -> int:
    """Nodes with a loaded standby server."""
    nodes = cluster.client.get("/nodes")["nodes"]
    return sum(any(s["state"] == "ready" for s in node.get("standbys", ())) for node in nodes)


def killed_by_us(cluster: Cluster, job: str, *, after: float) -> list[str]:
    events = cluster.client.pages("/events", "events", limit=1000, job=job)
    ends = [event for event in events if event["kind"] == "rank_exited" and event["at"] >= after]
    assert ends
    return [event["text"] for event in ends if "SIGKILL" in event["text"]]


def placed(cluster: Cluster, job: str) -> str:
    events = cluster.client.pages("/events", "events", limit=1000, job=job)
    return str([event for event in events if event["kind"] == "placed"][-1]["text"])


def points(cluster: Cluster, job: str) -> list[Json]:
    return list(cluster.client.pages(f"/jobs/{job}/metrics", "points", limit=10_000))
