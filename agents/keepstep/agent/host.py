"""What kind of machine this is, how it is reached, how much of it is in use: from /proc and its routes."""

import contextlib
import fcntl
import os
import socket
import struct
from pathlib import Path
from urllib.parse import urlsplit

from keepstep.wire.messages import NodeStatus

_SIOCGIFADDR = 0x8915
_LOOPBACK = ("127.0.0.1", "lo")


def node_status() -> NodeStatus:
    memory = _kilobytes(Path("/proc/meminfo"), ("MemTotal", "MemAvailable"))
    own = _kilobytes(Path("/proc/self/status"), ("VmRSS",))
    return NodeStatus(
        load=round(os.getloadavg()[0], 2),
        memory_total_bytes=memory.get("MemTotal", 0),
        memory_available_bytes=memory.get("MemAvailable", 0),
        agent_memory_bytes=own.get("VmRSS", 0),
    )


def cpu_count() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def training_address(controller: str, address: str | None, interface: str | None) -> tuple[str, str]:
    """Where ranks of other nodes reach this node's: (address, interface).

    A setting, else the address and interface by which this machine reaches the controller, which its peers
    reach as well. No packet is sent for that. The loopback for a controller on this machine.
    """
    if address is None and interface is not None:
        address = _address_of(interface)
    if address is None:
        address = _route_to(urlsplit(controller).hostname or "127.0.0.1") or _LOOPBACK[0]
    if interface is None:
        interface = _interface_of(address)
    return address, interface


def _route_to(host: str) -> str | None:
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None  # no route at this moment; asked again at the next connection


def _interface_of(address: str) -> str:
    if address.startswith("127.") or address == "::1":
        return _LOOPBACK[1]
    for _, name in socket.if_nameindex():
        if _address_of(name) == address:
            return name
    with contextlib.suppress(OSError, ValueError):
        wanted = socket.inet_pton(socket.AF_INET6, address).hex()
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            fields = line.split()
            if fields[0] == wanted:
                return fields[-1]
    return ""


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            raw = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None  # it has no IPv4 address
    return socket.inet_ntoa(raw[20:24])


def _kilobytes(path: Path, names: tuple[str, ...]) -> dict[str, int]:
    found = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in names:
            found[name] = int(rest.split()[0]) * 1024
    return found
