"""Hosts that share nothing but a disk: network namespaces with two networks, as a data centre has them.

`management` carries agents and controller, `training` carries ranks. A host is cut off a network by taking
its port off the bridge: its packets vanish and no connection is reset, as with a dead switch. Needs root and
iproute2; everything is named by this process and removed at the end, also what a killed run left.
"""

import os
import subprocess
from dataclasses import dataclass, field

NETWORKS = {"management": "10.77", "training": "10.78"}


def missing() -> str:
    """Why namespaces cannot be had here, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        _ip("-V")
    except (OSError, subprocess.CalledProcessError):
        return "network namespaces need iproute2"
    name = f"ks{os.getpid()}probe"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except subprocess.CalledProcessError as problem:
        return f"this kernel gives no network namespaces: {problem.stderr}"
    return ""


@dataclass
class Hosts:
    """`names` become namespaces with an address in each network; the bridges live in one of their own."""

    names: tuple[str, ...]
    prefix: str = field(default_factory=lambda: f"ks{os.getpid() % 100000}")

    def __enter__(self) -> "Hosts":
        self._remove()
        switch = self._namespace("sw")
        _ip("netns", "add", switch)
        for network in NETWORKS:
            _ip("-n", switch, "link", "add", network[:8], "type", "bridge")
            _ip("-n", switch, "link", "set", network[:8], "up")
        for number, name in enumerate(self.names, 1):
            space = self._namespace(name)
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            for network, prefix in NETWORKS.items():
                port, link = self._port(name, network), network[:4]
                _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", link, "netns", space)
                _ip("-n", switch, "link", "set", port, "master", network[:8], "up")
                _ip("-n", space, "address", "add", f"{prefix}.0.{number}/16", "dev", link)
                _ip("-n", space, "link", "set", link, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def address(self, name: str, network: str) -> str:
        return f"{NETWORKS[network]}.0.{self.names.index(name) + 1}"

    def interface(self, network: str) -> str:
        return network[:4]

    def command(self, name: str, *argv: str) -> list[str]:
        """`argv` as a command that runs on that host."""
        return ["ip", "netns", "exec", self._namespace(name), *argv]

    def cut(self, name: str, *networks: str) -> None:
        """From now on the host's packets on these networks are dropped."""
        for network in networks or NETWORKS:
            _ip("-n", self._namespace("sw"), "link", "set", self._port(name, network), "nomaster")

    def mend(self, name: str, *networks: str) -> None:
        for network in networks or NETWORKS:
            port = self._port(name, network)
            _ip("-n", self._namespace("sw"), "link", "set", port, "master", network[:8])

    def slow(self, name: str, network: str, rate: str) -> None:
        """From now on what the host sends on this network leaves at this rate, and waits for its turn."""
        link = network[:4]
        shape = ("tbf", "rate", rate, "burst", "16kb", "latency", "400ms")
        _run("tc", "-n", self._namespace(name), "qdisc", "replace", "dev", link, "root", *shape)

    def quick(self, name: str, network: str) -> None:
        _run("tc", "-n", self._namespace(name), "qdisc", "del", "dev", network[:4], "root")

    def _namespace(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    @staticmethod
    def _port(name: str, network: str) -> str:
        return f"{name[:8]}-{network[:4]}"

    def _remove(self) -> None:
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines():
            space = line.split()[0] if line.split() else ""
            if space.startswith(f"{self.prefix}-"):
                _ip("netns", "del", space)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
