"""Agents on this machine that each have a driver (a stand-in), GPUs and a kernel's log of their own."""

import asyncio
import fcntl
import signal
from pathlib import Path
from typing import Any

from agents import Agent, left_of
from cluster import Cluster, shown
from keepstep.agent.probes.xid.kmsg import seconds_since_boot
from nvml_standin import Standin

NO_TORCH = """
import fcntl
with open({held!r}) as file:
    fcntl.flock(file, fcntl.LOCK_SH)
raise ImportError("there is no torch on these machines")
"""


class Machines:
    """Agents with a GPU, a driver and a kernel's log each, on a controller that starts none itself.

    Their Python has no torch, so a validation can test nothing; and it takes until `let_validations_end`.
    """

    def __init__(self, folder: Path, *nodes: str, gpus: int = 1, policy: str = "") -> None:
        file = folder / "policy.yaml"
        file.write_text(policy)
        self._folder, held = folder, folder / "held"
        (folder / "lib").mkdir()
        (folder / "lib" / "torch.py").write_text(NO_TORCH.format(held=str(held)))
        self._held = held.open("w")
        fcntl.flock(self._held, fcntl.LOCK_EX)
        self.cluster = Cluster(folder / "home", nodes=0, slots=1, health_policy=str(file))
        self.logs = {node: folder / f"{node}.kmsg" for node in nodes}
        self.lines = dict.fromkeys(nodes, 0)
        self.agents: dict[str, Agent] = {}
        self.drivers: dict[str, Standin] = {}
        try:
            self._start(nodes, gpus)
        except BaseException:
            self.close()
            raise

    def _start(self, nodes: tuple[str, ...], gpus: int) -> None:
        folder = self._folder
        for node in nodes:
            driver = self.drivers[node] = Standin(folder / f"nvml-{node}", gpus=gpus)
            for number in range(gpus):
                driver.gpu(number).uuid = self.gpu(node, number).encode()
            self.logs[node].touch()
            self.agents[node] = Agent(
                folder / node, self.cluster.home.controller_file, "--pool", "static", "--kernel-log",
                str(self.logs[node]), "--address", "127.0.0.1", "--interface", "lo", "--slots", "1",
                node=node, env={**driver.env, "PYTHONPATH": str(folder / "lib")},
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

    def let_validations_end(self) -> None:
        fcntl.flock(self._held, fcntl.LOCK_UN)

    def close(self) -> None:
        """Interrupted agents end their ranks and standby servers first, as they do on a leash."""
        self._held.close()
        try:
            for agent in self.agents.values():
                if agent.running:
                    agent.signal(signal.SIGINT)
            for agent in self.agents.values():
                asyncio.run(agent.ended())
            left = {p.pid: shown(p.pid) for name in self.agents for p in left_of(self._folder / name, name)}
            assert not left, f"agents left behind: {left}"
        finally:
            for agent in self.agents.values():
                asyncio.run(agent.clear())
            self.cluster.close()
