"""Nodes' health from the kernel's log to the hook and back: real controller, real agents, a stand-in NVML."""

import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents import Agent
from cluster import Cluster
from keepstep.agent.probes.xid.kmsg import seconds_since_boot
from keepstep.core.errors import Refused
from nvml_standin import Standin, compiler_here

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


class Machines:
    """Agents with a GPU, a driver and a kernel's log each, on a controller that starts none itself."""

    def __init__(self, folder: Path) -> None:
        self.done = folder / "done"
        policy = folder / "policy.yaml"
        policy.write_text(POLICY % self.done)
        self.cluster = Cluster(folder / "home", nodes=0, slots=1, health_policy=str(policy))
        self.logs = {node: folder / f"{node}.kmsg" for node in NODES}
        self.agents = {}
        for number, node in enumerate(NODES):
            driver = Standin(folder / f"nvml-{node}", gpus=1)
            driver.gpu(0).uuid = self.gpu(node).encode()
            self.logs[node].touch()
            self.agents[node] = Agent(
                folder / node, self.cluster.home.controller_file, "--pool", "static", "--kernel-log",
                str(self.logs[node]), "--address", "127.0.0.1", "--interface", "lo", node=node,
                env=driver.env,
            )  # fmt: skip
            self.agents[node].start()
            self.lines = number
        self.cluster.until(lambda: len(self.cluster.connected()) == len(NODES), "the agents")

    @staticmethod
    def gpu(node: str) -> str:
        return f"GPU-{node}"

    def xid(self, node: str, code: int) -> float:
        """The kernel's line, now."""
        self.lines += 1
        text = f"NVRM: Xid (PCI:0000:0f:00): {code}, pid=7, it broke"
        line = f"4,{self.lines},{int(seconds_since_boot() * 1e6)},-;{text}\n"
        with self.logs[node].open("a") as file:
            file.write(line)
        return time.monotonic()

    def node(self, name: str) -> dict[str, Any]:
        return self.cluster.client.get(f"/nodes/{name}")

    def history(self, name: str) -> list[dict[str, Any]]:
        return self.cluster.client.pages(f"/nodes/{name}/history", "events", limit=500)

    def kinds(self, name: str) -> list[str]:
        """Of its life, in order."""
        kinds = [event["kind"] for event in self.history(name)]
        return [kind for kind in kinds if kind.startswith("node ") and kind != "node registered"]

    def until(self, name: str, life: str) -> None:
        self.cluster.until(
            lambda: self.node(name)["life"] == life, f"{name} to be {life}: {self.node(name)}", within_s=60
        )

    def close(self) -> None:
        for agent in self.agents.values():
            agent.signal(signal.SIGTERM)
            asyncio.run(agent.ended())
        self.cluster.close()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path)
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
        "XID 31 on GPU-" + first + " (exception on a GPU): restart the application"
    )
    cluster.kill_controller()
    cluster.start()
    cluster.until(lambda: len(cluster.connected()) == len(NODES), "the agents to be back")

    # One that policy calls the GPU's: its job leaves for the spare, the hook repairs it.
    written = machines.xid(sick, 48)
    cluster.until(lambda: machines.node(sick)["life"] != "healthy", "the node to go")
    print(f"xid to the stored decision, seen over REST: {time.monotonic() - written:.2f} s")
    told = cluster.wait(job, lambda told: told["attempt"] and told["attempt"]["number"] == 2)
    assert set(told["attempt"]["nodes"]) == {first, spare}
    [incident] = cluster.incidents(job)
    assert (incident["verdict"], incident["culprit"]["node"]) == ("sick node", sick), incident
    machines.until(sick, "validating")
    [done] = machines.done.read_text().splitlines()
    assert done.startswith(f"{sick}: drain and reset (") and f"XID 48 on GPU-{sick} (GPU needs" in done
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
