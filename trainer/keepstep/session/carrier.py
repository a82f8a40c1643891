"""A rank's line to its node's carrier, which holds the memory files. Standard library only.

Requests wait for their answer, with a deadline; `nudge` never waits. A carrier that is gone costs copies, not
the rank: `nudge` says so, and the rank hands its file to the next one.
"""

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepstep.core.errors import KeepstepError, Refused, Unreachable

FOLDER = "KEEPSTEP_CARRIER"  # the variable that names the carrier's folder
EVERY = "KEEPSTEP_SNAPSHOT_EVERY"  # and that says between how many steps a script's state is kept
SOCKET = "carrier.sock"
_ANSWER_S = 120.0  # gigabytes are reserved, or fetched from another node
_FILES_MAX = 253


class Carrier:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._peer: socket.socket | None = None

    def ask(
        self, files: Sequence[int] = (), *, within_s: float = _ANSWER_S, **request: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """The answer and the files that came with it. Errors: Unreachable, Refused."""
        peer = self._connected()
        peer.settimeout(within_s)
        received: list[int] = []
        try:
            line = json.dumps(request).encode() + b"\n"
            if files:
                socket.send_fds(peer, [line[:1]], list(files))
                line = line[1:]
            peer.sendall(line)
            data = b""
            while not data.endswith(b"\n"):
                more, descriptors, _, _ = socket.recv_fds(peer, 1 << 16, _FILES_MAX)
                received += descriptors
                if not more:
                    raise ConnectionResetError("it hung up")
                data += more
            answer: dict[str, Any] = json.loads(data)
            if "error" in answer:
                raise Refused("this node's carrier refuses", why=str(answer["error"]))
        except BaseException as error:
            for descriptor in received:
                os.close(descriptor)
            if isinstance(error, KeepstepError):
                raise
            self.close()  # an answer that comes later belongs to nobody
            if isinstance(error, OSError):
                raise Unreachable("no carrier", where=str(self._folder), why=str(error)) from error
            raise
        return answer, received

    def nudge(self) -> bool:
        """There is a new snapshot. False: the carrier that has this rank's file is gone."""
        if self._peer is None:
            return False
        try:
            self._peer.send(b'{"do":"taken"}\n', socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass  # it has nudges enough
        except OSError:
            self.close()
            return False
        return True

    def close(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def _connected(self) -> socket.socket:
        if self._peer is None:
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # By way of a descriptor: a socket's path may have 107 bytes at most.
                folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
                try:
                    peer.setblocking(False)  # a full backlog is an error, not a wait
                    peer.connect(f"/proc/self/fd/{folder}/{SOCKET}")
                finally:
                    os.close(folder)
            except OSError as error:
                peer.close()
                raise Unreachable("no carrier", where=str(self._folder), why=str(error)) from error
            self._peer = peer
        return self._peer
