"""What the suite needs to know of each pool: how its nodes come up, are lost, and are known to be lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cluster import Cluster
from keepstep.cli.rayed import RayOptions
from ray_cluster import RayCluster


class Bench(Protocol):
    """One pool with two nodes of two slots, on a controller of its own."""

    cluster: Cluster
    pool: str

    def lose(self, node: str) -> None:
        """Everything on the node is gone, and whoever can know that says so."""
        ...

    def bring_back(self, node: str) -> None: ...


class Local:
    pool = "local"

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder / "home", nodes=2, slots=2, return_after_s=3600.0)

    def lose(self, node: str) -> None:
        self.cluster.lose_node(node)

    def bring_back(self, node: str) -> None:
        pass  # after `return_after_s`, by the pool itself

    def close(self) -> None:
        self.cluster.close()


class Static:
    """Agents as a person starts them on two machines: by hand, with a join token."""

    pool = "static"

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder / "home", nodes=0, slots=2)
        self._token = folder / "join.token"
        self._token.write_text(self.cluster.client.post("/tokens", {"name": "join", "join": True})["secret"])
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        for node in ("a", "b"):
            self.bring_back(node)
        self.cluster.until(lambda: len(self.cluster.connected()) == 2, "two agents to register")

    def bring_back(self, node: str) -> None:
        if node in self._agents:
            self._agents[node].wait(30)  # the one before was killed
        folder = self.cluster.home.nodes / node
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "keepstep.agent", "--node", node, "--dir", str(folder), "--pool", self.pool,
            "--controller", self.cluster.running.url, "--token-file", str(self._token), "--slots", "2",
            "--address", "127.0.0.1", "--interface", "lo",
        ]  # fmt: skip
        with (folder / "agent.log").open("ab") as log:
            self._agents[node] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def lose(self, node: str) -> None:
        self.cluster.lose_node(node)
        self._agents.pop(node).wait(30)
        self.cluster.until(lambda: node not in self.cluster.connected(), f"{node} to be missed")
        self.cluster.client.post(f"/nodes/{node}/confirm-lost", {"reason": "its plug was pulled"})

    def close(self) -> None:
        for agent in self._agents.values():
            agent.send_signal(signal.SIGINT)
        for agent in self._agents.values():
            agent.wait(60)
        self.cluster.close()


class OnRay:
    """Two nodes of a Ray cluster, which the pool knows by their label; a lost one comes back as a new one."""

    pool = "ray"

    def __init__(self, folder: Path, ray: RayCluster) -> None:
        self.ray = ray
        home = folder / "home"
        here = RayOptions(
            address=ray.address, resource=ray.resource, labels=("bench=contract",), folder=str(home / "nodes")
        )
        for node in ("a", "b"):
            if not ray.nodes().get(node):
                ray.add(node, 2, bench="contract")
        self.cluster = Cluster(home, nodes=0, slots=2, ray=here)
        self.cluster.until(lambda: set(self.known()) >= {"a", "b"}, "two nodes to be known")

    def known(self) -> list[str]:
        return [node["name"] for node in self.cluster.client.get("/nodes")["nodes"]]

    def lose(self, node: str) -> None:
        """The whole machine, as far as this one can: its raylet, its actors, and all that is keepstep's."""
        actor = next(one for one in self.ray.actors() if one["node"] == node)
        self.ray.kill(node)
        os.kill(actor["pid"], signal.SIGKILL)
        self.cluster.lose_node(node)

    def bring_back(self, node: str) -> None:
        pass  # its actor does

    def close(self) -> None:
        self.cluster.close()
        assert not self.ray.actors()
        assert not self.ray.groups()


@contextmanager
def bench(pool: str, folder: Path, ray: Callable[[], RayCluster]) -> Iterator[Bench]:
    """`ray`: the cluster that all tests share, started by the first one that asks."""
    made: Local | Static | OnRay
    match pool:
        case "local":
            made = Local(folder)
        case "static":
            made = Static(folder)
        case _:
            made = OnRay(folder, ray())
    try:
        yield made
    finally:
        made.close()
