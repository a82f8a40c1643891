"""What the kernel says of TCP connections: real ones of this process."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from keepstep.agent.sockets import Connection, connection_of, connections, links_of


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with ExitStack() as stack:
        listening = stack.enter_context(
            socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        )
        near = stack.enter_context(socket.create_connection(("127.0.0.1", listening.getsockname()[1])))
        far, _ = listening.accept()
        yield near, stack.enter_context(far)


def inode(of: socket.socket) -> int:
    return os.fstat(of.fileno()).st_ino


def test_a_connection_is_found_with_its_round_trip(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    near.sendall(b"there")
    far.sendall(far.recv(16))
    assert near.recv(16) == b"there"
    found = {one.inode: one for one in connections()}
    for one in (found[inode(near)], found[inode(far)]):  # IPv4, and IPv4 by way of a socket of IPv6
        assert (one.local, one.peer, one.used) == ("127.0.0.1", "127.0.0.1", True)
        assert 0 < one.rtt_least_s <= one.rtt_s < 1.0
        assert (one.unanswered_s, one.resent) == (0.0, 0.0)
    assert links_of(os.getpid(), connections()) == [], "what stays on a machine is no link"


def test_links_are_those_of_one_process_by_the_other_host(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    one = Connection(
        inode=inode(near), local="10.0.0.1", peer="10.0.0.2", rtt_s=0.002, rtt_least_s=0.001,
        unanswered_s=0.0, resent=0.0, used=True,
    )  # fmt: skip
    slower = replace(one, inode=inode(far), rtt_s=0.05, resent=0.1)
    idle = replace(one, inode=inode(far), rtt_s=9.0, used=False)
    cut = replace(idle, peer="10.0.0.3", unanswered_s=4.0)
    of_another = replace(one, inode=1, peer="10.0.0.4")
    assert links_of(os.getpid(), [one, slower, idle, cut, of_another]) == [
        {"local": "10.0.0.1", "peer": "10.0.0.2", "rtt_s": 0.05, "rtt_least_s": 0.001, "unanswered_s": 0.0,
         "resent": 0.1},
        {"local": "10.0.0.1", "peer": "10.0.0.3", "rtt_s": 0.0, "rtt_least_s": 0.0, "unanswered_s": 4.0,
         "resent": 0.0},
    ]  # fmt: skip
    (silent,) = links_of(os.getpid(), [idle])
    assert (silent["local"], silent["rtt_s"]) == ("10.0.0.1", 0.0), "or nobody knows where it is cut off"
    assert links_of(2**22 + 1, [one]) == [], "a process that is gone has none"


@pytest.mark.parametrize("length", [0, 10, 72, 80, 120])
def test_what_is_cut_short_says_nothing(length: int) -> None:
    assert connection_of(bytes(length)) is None
