"""A node with a sick device is found by screening its pool, and does not return; a good one does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import WITHIN_S, Cluster, Json

SCRIPTS = Path(__file__).parent / "scripts"
POLICY = """
correlation: {within: 1s}
deadlines: {probation: 1s}
"""


def test_the_sick_node_of_a_pool(
    start: Callable[..., Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (SCRIPTS / "faults", SCRIPTS.parents[1]))))
    monkeypatch.setenv("SICKNESS", "c:wrong:aten.mm")
    (tmp_path / "policy.yaml").write_text(POLICY)
    cluster = start(nodes=3, slots=1, health_policy=str(tmp_path / "policy.yaml"))
    client = cluster.client

    def keepstep(*arguments: str) -> "subprocess.CompletedProcess[str]":
        program = Path(sys.executable).with_name("keepstep")
        environ = {**os.environ, "KEEPSTEP_HOME": str(cluster.home.path)}
        return subprocess.run(
            [program, "node", *arguments], env=environ, capture_output=True, text=True, check=False,
            timeout=WITHIN_S,
        )  # fmt: skip

    def validations(node: str) -> list[Json]:
        found: list[Json] = client.get(f"/nodes/{node}/history")["validations"]
        return [one for one in found if not one["job"].startswith("screen-")]

    # By pairs: c fails with both others, who are right with each other.
    screening = keepstep("screen", "--output", "json")
    assert screening.returncode == 7 and "sick: c" in screening.stderr, screening
    found = json.loads(screening.stdout)
    results = {node["name"]: node["result"] for node in found["nodes"]}
    assert (results, found["rounds"], found["links"]) == ({"a": "good", "b": "good", "c": "sick"}, 3, []), (
        found
    )
    assert "fails with a, b (wrong: matmul on rank " in found["nodes"][2]["text"], found

    # That takes it out. Alone it is wrong, too, so it does not come back.
    cluster.until(lambda: validations("c"), "c to be validated")
    [failed] = validations("c")
    assert not failed["passed"]
    assert failed["text"].startswith("wrong: matmul on rank 0: torch.bfloat16 gives "), failed
    assert client.get("/nodes/c")["life"] == "quarantined"

    # One that a person has validated is right alone and with the other good one, and works again.
    assert keepstep("validate", "a", "--reason", "after new cables").returncode == 0
    cluster.until(lambda: validations("a"), "a to be validated")
    [passed] = validations("a")
    assert passed["passed"] and passed["text"].endswith("and with b"), passed
    [alone, pair] = passed["figures"]["kept"]
    assert (alone["nodes"], pair["nodes"]) == (["a"], ["a", "b"])
    assert alone["figures"]["matmul"] > 0 and alone["checksums"]["training"]
    cluster.until(lambda: client.get("/nodes/a")["life"] == "healthy", "a to have proved itself")


def test_a_controller_that_dies_in_the_middle_of_a_validation(
    start: Callable[..., Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one waits for the very same trial, and the node returns."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (SCRIPTS / "faults", SCRIPTS.parents[1]))))
    monkeypatch.setenv("SICKNESS", "a:slow:aten.mm")  # takes a while; there is nobody to compare it with
    (tmp_path / "policy.yaml").write_text(POLICY)
    cluster = start(nodes=2, slots=1, health_policy=str(tmp_path / "policy.yaml"))
    client = cluster.client

    def trials() -> list[Json]:
        found: list[Json] = cluster.client.pages("/jobs", "jobs", limit=100)
        return found

    client.post("/nodes/a/validate", {"reason": "after new cables"})
    cluster.until(lambda: any(job["state"] == "running" for job in trials()), "the trial to run")
    [running] = trials()
    cluster.kill_controller()
    cluster.start()
    cluster.until(lambda: cluster.client.get("/nodes/a")["life"] == "healthy", "a to have proved itself")
    [passed] = cluster.client.get("/nodes/a/history")["validations"]
    assert passed["passed"] and passed["job"] == running["id"], passed
    assert passed["text"].endswith("and with b"), passed
    found = cluster.client.pages("/jobs", "jobs", limit=100)
    assert len(found) == 2 and {job["state"] for job in found} == {"succeeded"}, found
    assert cluster.client.get(f"/jobs/{running['id']}")["attempt"]["number"] == 1
