"""How the kernel fares with a rank's TCP connections: who is far away, and who does not answer at all.

The kernel measures the round trip of every connection and counts what it has to send again, so nothing is
sent to find out, and no rank is asked. One dump of all sockets serves all ranks of a node. A gang over RDMA
has no such connections, and then there is nothing to tell.

links of a rank   [{local, peer, rtt_s, rtt_least_s, unanswered_s, resent}...], one for each other host:
                  of the connections that carried something in the last seconds the slowest round trip, the
                  least that was ever seen (in the kernel's window of five minutes) and the share sent again,
                  0 if none did: the end that waits for a host that is cut off must say where it is, too;
                  for how long nothing that was sent has been answered (0: it is, or nothing was sent)
"""

import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any

_SOCK_DIAG, _BY_FAMILY, _DUMP = 4, 20, 0x301  # NETLINK_SOCK_DIAG; SOCK_DIAG_BY_FAMILY; REQUEST | DUMP
_DONE, _ERROR = 3, 2
_ESTABLISHED, _INFO = 1, 2  # TCP_ESTABLISHED; INET_DIAG_INFO
_HEADER, _REQUEST = struct.Struct("=IHHII"), struct.Struct("=BBBxI48x")
_SOCKET = struct.Struct("=BBBB2s2s16s16sIIIIIIII")
# Offsets in struct tcp_info, which only ever grows at its end.
_UNACKED, _SENT, _RECEIVED, _ANSWERED, _RTT, _RESENT, _SEGMENTS, _LEAST = 24, 44, 52, 56, 68, 100, 136, 148
_UNKNOWN_US = 0xFFFFFFFF
_RECENT_MS, _DUMP_BYTES, _DUMPS_MAX = 5000, 1 << 18, 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    inode: int
    local: str
    peer: str
    rtt_s: float
    rtt_least_s: float
    unanswered_s: float
    resent: float
    used: bool  # carried data in the last seconds


def links_of(pid: int, connections: Iterable[Connection]) -> list[dict[str, Any]]:
    """Of one process, by the other host."""
    inodes = _inodes(pid)
    by_peer: dict[tuple[str, str], list[Connection]] = {}
    for one in connections:
        if one.inode in inodes and one.local != one.peer and not one.local.startswith("127."):
            by_peer.setdefault((one.local, one.peer), []).append(one)
    found = []
    for (local, peer), several in sorted(by_peer.items()):
        used = [one for one in several if one.used]
        found.append(
            {
                "local": local, "peer": peer,
                "rtt_s": max((one.rtt_s for one in used), default=0.0),
                "rtt_least_s": min((one.rtt_least_s for one in used), default=0.0),
                "unanswered_s": max(one.unanswered_s for one in several),
                "resent": max((one.resent for one in used), default=0.0),
            }
        )  # fmt: skip
    return found


def connections() -> list[Connection]:
    """All established ones of this network namespace; none where the kernel does not tell."""
    found: list[Connection] = []
    with suppress(OSError):
        for family in (socket.AF_INET, socket.AF_INET6):
            found += _dump(family)
    return found


def _dump(family: int) -> Iterator[Connection]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _SOCK_DIAG) as kernel:
        kernel.settimeout(1.0)
        kernel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        body = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (_INFO - 1), 1 << _ESTABLISHED)
        kernel.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _DUMP, 1, 0) + body)
        for _ in range(_DUMPS_MAX):
            data, at = kernel.recv(_DUMP_BYTES), 0
            while at + _HEADER.size <= len(data):
                length, kind, *_more = _HEADER.unpack_from(data, at)
                if kind in {_DONE, _ERROR} or length < _HEADER.size:
                    return
                one = connection_of(data[at + _HEADER.size : at + length])
                if one is not None:
                    yield one
                at += length + 3 & ~3


def connection_of(message: bytes) -> Connection | None:
    """One message of the kernel: struct inet_diag_msg, and its attributes."""
    if len(message) < _SOCKET.size:
        return None
    family, *_ports, source, destination, _device, _c0, _c1, _ex, _rq, _wq, _uid, inode = _SOCKET.unpack_from(
        message
    )
    at = _SOCKET.size
    while at + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, at)
        if length < 4:
            return None
        info = message[at + 4 : at + length]
        if kind == _INFO and len(info) >= _SEGMENTS + 4:
            return _measured(inode, _address(family, source), _address(family, destination), info)
        at += length + 3 & ~3
    return None


def _measured(inode: int, local: str, peer: str, info: bytes) -> Connection:
    def word(offset: int) -> int:
        return int.from_bytes(info[offset : offset + 4], sys.byteorder)

    retransmits, unacked = info[2], word(_UNACKED)
    sent_ms, received_ms, answered_ms = word(_SENT), word(_RECEIVED), word(_ANSWERED)
    least_us = word(_LEAST) if len(info) >= _LEAST + 4 else _UNKNOWN_US
    rtt_us = word(_RTT)
    return Connection(
        inode=inode,
        local=local,
        peer=peer,
        rtt_s=rtt_us / 1e6,
        rtt_least_s=(rtt_us if least_us in {0, _UNKNOWN_US} else least_us) / 1e6,
        unanswered_s=answered_ms / 1e3 if retransmits and unacked else 0.0,
        resent=min(word(_RESENT) / max(word(_SEGMENTS), 1), 1.0),
        used=min(sent_ms, received_ms) < _RECENT_MS,
    )


def _address(family: int, raw: bytes) -> str:
    if family == socket.AF_INET:
        return socket.inet_ntoa(raw[:4])
    address = IPv6Address(raw)
    return str(address.ipv4_mapped or address)


def _inodes(pid: int) -> frozenset[int]:
    found = set()
    with suppress(OSError):  # it is gone
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - only the names
            with suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")  # noqa: PTH115
                if target.startswith("socket:["):
                    found.add(int(target[8:-1]))
    return frozenset(found)
