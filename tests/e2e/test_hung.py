"""Ranks that stop, loop, block or leave: each is named and the job goes on. A debugged one is left alone."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster, Json
from specs import TINY

Start = Callable[..., Cluster]
FAULTS = Path(__file__).parent / "scripts" / "faults"
PAIR = TINY.replace("nodes: 2, gpus_per_node: 2", "nodes: 2, gpus_per_node: 1").replace("tp: 2", "tp: 1")
TRIO = PAIR.replace("nodes: 2, gpus_per_node: 1", "nodes: 1, gpus_per_node: 3").replace("dp: 2", "dp: 3")
TRIO = TRIO.replace("global_tokens: 512", "global_tokens: 384").replace("steps: 60", "steps: 72")
_PTRACE_SEIZE, _PTRACE_INTERRUPT, _PTRACE_DETACH = 0x4206, 0x4207, 17


def faulty(cluster: Cluster, fault: str, spec: str = PAIR, **more: str) -> str:
    """A job of which one rank does something: KIND:RANK:STEP."""
    environment = {
        "PYTHONPATH": str(FAULTS),
        "DISTURB": fault,
        "DISTURB_FOLDER": str(cluster.home.path),
        **more,
    }
    return cluster.submit(spec, *(f"run.env.{name}={value}" for name, value in environment.items()))


def recovered(cluster: Cluster, job: str) -> Json:
    """The one incident of a job that trained to its end after it."""
    told = cluster.wait_state(job, "succeeded", "failed")
    assert told["state"] == "succeeded", cluster.story(job)
    incidents = cluster.incidents(job)
    assert len(incidents) == 1, cluster.story(job)
    return incidents[0]


def test_a_stopped_rank_is_named_at_once(start: Start) -> None:
    cluster = start(nodes=2, slots=1)
    job = cluster.submit(PAIR)
    cluster.wait_step(job, 10)
    cluster.kill_rank(job, 1, signal.SIGSTOP)
    incident = recovered(cluster, job)
    assert (incident["verdict"], incident["culprit"]["rank"]) == ("hung", 1), incident
    assert "is stopped" in incident["evidence"]["what"]


# One attempt suffers each of them; what the verdict says beside rank and kind.
FAULTS_IN_TURN = {
    "loop:1:12": ("hung", "nothing moved for"),
    "lock:1:24": ("hung", "with the interpreter's lock held"),
    "fifo:1:36": ("hung", "blocked in the kernel"),
    "mismatch:1:48": ("hung", "does not fit the others"),
    "exit:1:60": ("exited early", "exited 0"),
}


def test_ranks_that_do_not_come_back_are_named(start: Start) -> None:
    cluster = start(nodes=1, slots=3)
    job = faulty(cluster, ",".join(FAULTS_IN_TURN), TRIO)
    told = cluster.wait_state(job, "succeeded", "failed")
    assert told["state"] == "succeeded", cluster.story(job)
    incidents = cluster.incidents(job)
    assert len(incidents) == len(FAULTS_IN_TURN), cluster.story(job)
    for (verdict, words), incident in zip(FAULTS_IN_TURN.values(), incidents, strict=True):
        evidence = incident["evidence"]
        assert (incident["verdict"], incident["culprit"]["rank"]) == (verdict, 1), incident
        assert words in evidence["what"] + evidence["noticed"], incident
    learnt = [incident["evidence"]["noticed"] for incident in incidents[:3]]
    assert all("learnt bound of forward" in noticed for noticed in learnt), learnt
    clash = incidents[3]["evidence"]
    assert "rank 1 is in gloo:barrier, ranks 0, 2 in gloo:all_reduce" in clash["what"], clash
    assert clash["began_s"] < 30.0, "needs no bound"
    for place in ("sitecustomize.py", "trainer.py"):  # where each of the two sides stands
        assert any(place in line for line in clash["lines"]), clash


def test_a_debugged_rank_is_left_alone(start: Start) -> None:
    cluster = start(nodes=2, slots=1)
    job = cluster.submit(PAIR)
    cluster.wait_step(job, 10)
    pid = int(cluster.ranks(job)[1]["pid"])
    trace(_PTRACE_SEIZE, pid)
    trace(_PTRACE_INTERRUPT, pid)
    try:
        cluster.wait(job, lambda told: "held by a debugger" in told["reason"])
        step = cluster.job(job)["progress"]["step"]
        time.sleep(5.0)  # three times the bound at which it would be ended if nobody debugged it
        assert cluster.job(job)["progress"]["step"] == step, "it was not held"
        assert not cluster.incidents(job)
    finally:
        trace(_PTRACE_DETACH, pid)
    cluster.wait_state(job, "succeeded")
    assert not cluster.incidents(job)


def trace(request: int, pid: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if request == _PTRACE_DETACH:
        os.waitpid(pid, 0x40000000)  # __WALL: it has stopped
    if library.ptrace(request, pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request}")
