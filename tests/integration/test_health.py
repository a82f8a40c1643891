"""Nodes' health from the kernel's log to the hook and back: real controller, real agents, a stand-in NVML."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.core.errors import InputError, Refused
from keepstep.spec.rules import load_rules
from machines import Machines
from nvml_standin import compiler_here
from wards import XIDS

pytestmark = pytest.mark.skipif(
    compiler_here() is None,
    reason="no C compiler here (cc, gcc or clang): the stand-in for NVML cannot be built",
)

POLICY = """
correlation: {within: 1s}
hysteresis: {burst_gap: 1s}
lemon: {replace_at: 1000}
deadlines: {probation: 1s, drain: 5m}
hooks:
  reset:
    command: [/bin/sh, -c, 'echo "$1: $2 ($3)" >> %s', sh, "{node}", "{action}", "{reason}"]
"""
JOB = """
name: gang
pool: static
resources: {{nodes: 2, gpus_per_node: 1, spares: 1}}
run:
  command: [{python}, -c, "import time; time.sleep(600)"]
  workdir: {folder}
  ship: none
  warm: never
"""
NODES, GPUS = ("g1", "g2", "g3"), 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("health")


@pytest.fixture(scope="module")
def machines(folder: Path) -> Iterator[Machines]:
    made = Machines(folder, *NODES, gpus=GPUS, policy=POLICY % (folder / "done"))
    yield made
    made.close()


def test_from_an_xid_to_the_repair_and_back(machines: Machines, folder: Path) -> None:
    cluster = machines.cluster
    job = cluster.submit(JOB.format(python=sys.executable, folder=folder))
    told = cluster.wait(job, lambda told: told["attempt"] and len(cluster.ranks(job)) == 2)
    first, sick = told["attempt"]["nodes"]
    spare = (set(NODES) - {first, sick}).pop()

    # An application's XID cordons nothing, is noted, and is not noted again by another controller.
    machines.xid(first, 31)
    cluster.until(lambda: "node found" in machines.kinds(first), "the XID to be noted")
    assert machines.history(first)[-1]["text"] == (
        f"XID 31 on {machines.gpu(first)} (exception on a GPU): restart the application"
    )
    cluster.kill_controller()
    cluster.start()
    cluster.until(lambda: len(cluster.connected()) == len(NODES), "the agents to be back")

    # One that policy calls the GPU's: its job leaves for the spare, the hook repairs it.
    machines.xid(sick, 48)
    written = time.monotonic()
    cluster.until(lambda: machines.node(sick)["life"] != "healthy", "the node to go")
    print(f"xid to the stored decision, seen over REST: {time.monotonic() - written:.2f} s")
    told = cluster.wait(job, lambda told: told["attempt"] and told["attempt"]["number"] == 2)
    assert set(told["attempt"]["nodes"]) == {first, spare}
    [incident] = cluster.incidents(job)
    assert (incident["verdict"], incident["culprit"]["node"]) == ("sick node", sick), incident
    machines.until(sick, "validating")
    [done] = (folder / "done").read_text().splitlines()
    assert (
        done.startswith(f"{sick}: drain and reset (") and f"XID 48 on {machines.gpu(sick)} (GPU needs" in done
    )
    with pytest.raises(Refused, match="already validating"):
        cluster.client.post(f"/nodes/{sick}/drain", {"reason": "again"})
    cluster.client.post(f"/nodes/{sick}/validated", {"passed": True, "reason": "by hand"})
    machines.until(sick, "healthy")
    assert machines.kinds(sick) == [
        f"node {kind}"
        for kind in (
            "found", "draining", "quarantined", "repairing", "repair", "validating", "validated", "healthy",
        )
    ]  # fmt: skip
    assert machines.kinds(first) == ["node found"] and machines.node(first)["life"] == "healthy"
    history = cluster.client.get(f"/nodes/{sick}/history")
    assert history["lemon"]["weeks"] == [0.0] * 7 + [1.0] and machines.node(sick)["lemon_score"] == 1.0
    shown = subprocess.run(
        [Path(sys.executable).with_name("keepstep"), "node", "history", sick], check=True, text=True,
        env={**os.environ, "KEEPSTEP_HOME": str(cluster.home.path)}, capture_output=True, timeout=60,
    )  # fmt: skip
    assert "validation passed: by hand" in shown.stdout
    assert shown.stdout.rstrip().endswith("0 0 0 0 0 0 0 1; replaced at 1000"), shown
    [validation] = history["validations"]
    assert (validation["passed"], validation["text"]) == (True, "by hand")

    with urllib.request.urlopen(f"{cluster.running.url}/metrics", timeout=10) as answer:  # noqa: S310
        metrics = answer.read().decode()
    assert 'keepstep_node_lives{life="healthy"} 3.0' in metrics
    assert 'keepstep_health_decisions_total{action="drain and reset",rule="GPU needs a reset"} 1.0' in metrics

    # People: who and why, everywhere.
    cluster.client.post(f"/nodes/{sick}/cordon", {"reason": "fans"})
    cordoned = machines.node(sick)
    assert (cordoned["life"], cordoned["life_reason"].split(" by ")[0]) == ("cordoned", "cordon")
    assert cordoned["life_owner"] and cordoned["life_reason"].endswith(": fans")
    cluster.client.post(f"/nodes/{sick}/uncordon", {"reason": "cleaned"})
    assert machines.history(sick)[-1]["principal"] == cordoned["life_owner"]
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")


def test_a_policy_with_an_error_is_refused_and_the_old_one_stays(machines: Machines, folder: Path) -> None:
    cluster, file = machines.cluster, folder / "policy.yaml"
    before, good = cluster.client.get("/health/policy"), file.read_text()
    file.write_text(good + "bounds:\n  share: most\n")
    try:
        with pytest.raises(InputError) as refused:
            cluster.client.post("/health/policy/reload")
        line = len(good.splitlines()) + 2
        assert f"policy.yaml:{line}:" in str(refused.value), refused.value
        assert cluster.client.get("/health/policy") == before
    finally:
        file.write_text(good)
    assert cluster.client.post("/health/policy/reload") == before


def test_a_node_on_which_nothing_can_be_tested_is_kept_for_a_person(machines: Machines) -> None:
    cluster, node = machines.cluster, NODES[0]
    cluster.client.post(f"/nodes/{node}/validate", {"reason": "after new cables"})
    machines.until(node, "validating")
    before = len(machines.kinds(node))
    machines.let_validations_end()
    machines.until(node, "quarantined")
    reason = machines.node(node)["life_reason"]
    assert reason.startswith("nothing could be tested: no rank said a word: failed, "), reason
    assert reason.endswith(f"; mend that, then keepstep node validate {node}")
    assert cluster.client.get(f"/nodes/{node}/history")["validations"] == []
    assert machines.kinds(node)[before:] == ["node trial", "node quarantined"]
    cluster.client.post(f"/nodes/{node}/uncordon", {"reason": "has none, and needs none"})


def test_every_row_of_the_xid_table_by_way_of_the_kernels_log(machines: Machines) -> None:
    """With a node out already, the breaker holds this one: so each finding is seen for itself."""
    cluster, (out, node, _) = machines.cluster, NODES
    cluster.client.post(f"/nodes/{out}/cordon", {"reason": "so that no other goes"})
    before = len(machines.history(node))
    used: dict[str, int] = {}
    expected = set()
    for code, (_, actions) in XIDS.items():
        rule = load_rules().rule("xid", code)
        assert rule is not None
        gpu = used[rule.name] = used.get(rule.name, 0) + 1  # the same rule on the same GPU is one burst
        machines.xid(node, code, gpu)
        if actions:
            where = machines.gpu(node, gpu)
            expected.add(f"XID {code} on {where} ({rule.name}): {actions[0]}")
    machines.drivers[node].lose(GPUS - 1)  # and no line says so
    lost = machines.gpu(node, GPUS - 1)

    def found() -> set[str]:
        events = machines.history(node)[before:]
        return {event["text"] for event in events if event["kind"] == "node found"}

    cluster.until(lambda: len(found()) > len(expected), "all of them to be found")
    [line] = found() - expected
    assert line.startswith(f"gpu.lost on {lost}") and line.endswith("(GPU off the bus): reboot")
    told = [event["text"] for event in machines.history(node) if event["kind"] == "node held"]
    assert told and "the breaker holds g2: 1 of 3 nodes of the fleet are out already" in told[0]
    assert machines.node(node)["life"] == "healthy"
