"""JSON lines over Unix sockets: what shim and standby server speak.

A peer that does not read costs nothing: its outgoing buffer is bounded, and a peer beyond it is dropped.
States are not queued: the owner asks `idle` before it pushes and pushes the newest later.
"""

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_INCOMING, _OUTGOING = 1 << 20, 4 << 20  # bytes


def bind(path: Path) -> socket.socket:
    """A listening socket of this name, 0600, however long the path is (the kernel's limit is 107 bytes)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.umask(mask)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(folder)
    listener.listen(64)
    listener.setblocking(False)
    return listener


def connect(path: Path) -> socket.socket:
    """A connected, non-blocking socket. Raises OSError when nobody listens."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            peer.setblocking(False)  # a full backlog is an error, not a wait
            peer.connect(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
    except BaseException:
        peer.close()
        raise
    return peer


class Peer:
    """One connection. `read` and `flush` are called when the socket is ready; neither waits."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.open = True
        self._incoming = b""
        self._outgoing: list[tuple[bytes, Sequence[int]]] = []

    @property
    def idle(self) -> bool:
        return not self._outgoing

    def read(self) -> list[dict[str, Any]]:
        """The requests that have come whole. A peer that sends anything but JSON objects is dropped."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        *whole, self._incoming = (self._incoming + data).split(b"\n")
        try:
            requests = [json.loads(line) for line in whole]
        except ValueError:
            requests = [None]
        if not data or len(self._incoming) > _INCOMING or not all(isinstance(r, dict) for r in requests):
            self.open = False
        return [request for request in requests if isinstance(request, dict)]

    def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Queue a message; descriptors travel with its first byte and must stay open until it is sent."""
        self._outgoing.append((json.dumps(message).encode() + b"\n", descriptors))
        if sum(len(data) for data, _ in self._outgoing) > _OUTGOING:
            self.open = False
        else:
            self.flush()

    def flush(self) -> None:
        while self._outgoing and self.open:
            data, descriptors = self._outgoing[0]
            try:
                if descriptors:
                    sent = socket.send_fds(self.socket, [data], list(descriptors))
                else:
                    sent = self.socket.send(data)
            except BlockingIOError:
                return
            except OSError:
                self.open = False
                return
            if sent == len(data):
                self._outgoing.pop(0)
            else:
                self._outgoing[0] = (data[sent:], ())

    def close(self) -> None:
        self.open = False
        with contextlib.suppress(OSError):
            self.socket.close()
