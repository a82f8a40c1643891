"""A node with a sick device is found by its validation, and by screening the pool; a good one returns."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import Cluster

SCRIPTS = Path(__file__).parent / "scripts"
POLICY = """
correlation: {within: 1s}
deadlines: {probation: 1s}
"""


def test_the_sick_node_of_a_pool(
    start: Callable[..., Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (SCRIPTS / "sick", SCRIPTS.parents[1]))))
    monkeypatch.setenv("SICKNESS", "local-2:wrong:aten.mm")
    (tmp_path / "policy.yaml").write_text(POLICY)
    cluster = start(nodes=3, slots=1, health_policy=str(tmp_path / "policy.yaml"))
    client = cluster.client
    names = sorted(cluster.connected())
    print(names)

    # By pairs: it fails with both others, who are right with each other.
    client.post("/health/screening", {"nodes": None})
    cluster.until(lambda: client.get("/health/screening")["done"], "the screening")
    found = client.get("/health/screening")
    assert {node["name"]: node["result"] for node in found["nodes"]} == {
        names[0]: "good", names[1]: "good", names[2]: "sick",
    }, found  # fmt: skip
