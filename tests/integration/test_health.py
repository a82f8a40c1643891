"""Nodes' health from the kernel's log to the hook and back: real controller, real agents, a stand-in NVML."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.core.errors import Refused
from machines import Machines
from nvml_standin import compiler_here

pytestmark = pytest.mark.skipif(
    compiler_here() is None,
    reason="no C compiler here (cc, gcc or clang): the stand-in for NVML cannot be built",
)

POLICY = """
correlation: {within: 1s}
hysteresis: {burst_gap: 1s}
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
NODES = ("g1", "g2", "g3")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path, *NODES, policy=POLICY % (tmp_path / "done"))
    yield made
    made.close()


def test_from_an_xid_to_the_repair_and_back(machines: Machines, tmp_path: Path) -> None:
    cluster = machines.cluster
    job = cluster.submit(JOB.format(python=sys.executable, folder=tmp_path))
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
    [done] = (tmp_path / "done").read_text().splitlines()
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
    [validation] = cluster.client.get(f"/nodes/{sick}/history")["validations"]
    assert (validation["passed"], validation["text"]) == (True, "by hand")

    # People: who and why, everywhere.
    cluster.client.post(f"/nodes/{sick}/cordon", {"reason": "fans"})
    shown = machines.node(sick)
    assert (shown["life"], shown["life_reason"].split(" by ")[0]) == ("cordoned", "cordon")
    assert shown["life_owner"] and shown["life_reason"].endswith(": fans")
    cluster.client.post(f"/nodes/{sick}/uncordon", {"reason": "cleaned"})
    assert machines.history(sick)[-1]["principal"] == shown["life_owner"]
    cluster.client.post(f"/jobs/{job}/cancel")
    cluster.wait_state(job, "cancelled")
