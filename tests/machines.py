"""Agents on this machine that each have a driver (a stand-in), GPUs and a kernel's log of their own."""

import asyncio
import signal
from pathlib import Path
from typing import Any

from agents import Agent
from cluster import Cluster
from keepstep.agent.probes.xid.kmsg import seconds_since_boot
from nvml_standin import Standin


class Machines:
    """Agents with a GPU, a driver and a kernel's log each, on a controller that starts none itself."""

    def __init__(self, folder: Path, *nodes: str, gpus: int = 1, policy: str = "") -> None:
        file = folder / "policy.yaml"
        file.write_text(policy)
        self.cluster = Cluster(folder / "home", nodes=0, slots=1, health_policy=str(file))
        self.logs = {node: folder / f"{node}.kmsg" for node in nodes}
        self.lines = dict.fromkeys(nodes, 0)
        self.agents: dict[str, Agent] = {}
        self.drivers: dict[str, Standin] = {}
        for node in nodes:
            driver = self.drivers[node] = Standin(folder / f"nvml-{node}", gpus=gpus)
            for number in range(gpus):
                driver.gpu(number).uuid = self.gpu(node, number).encode()
            self.logs[node].touch()
            self.agents[node] = Agent(
                folder / node, self.cluster.home.controller_file, "--pool", "static", "--kernel-log",
                str(self.logs[node]), "--address", "127.0.0.1", "--interface", "lo", node=node,
                env=driver.env,
            )  # fmt: skip
            self.agents[node].start()
        self.cluster.until(lambda: len(self.cluster.connected()) == len(nodes), "the agents")

    @staticmethod
    def gpu(node: str, number: int = 0) -> str:
        return f"GPU-{node}-{number}"

    def xid(self, node: str, code: int, gpu: int = 0, times: int = 1) -> None:
        """The kernel's lines, now."""
        now = int(seconds_since_boot() * 1e6)
        text = f"NVRM: Xid (PCI:0000:{0x0F + gpu:02x}:00): {code}, pid=7"
        first = self.lines[node] + 1
        self.lines[node] += times
        with self.logs[node].open("a") as file:
            file.write("".join(f"4,{number},{now},-;{text}\n" for number in range(first, first + times)))

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
