"""The marker: KEEPSTEP_ATTEMPT=<job>/<attempt>/<node> in the initial environment of every process of an
attempt.

The kernel shows in /proc/PID/environ the bytes that a process was started with, wherever it went since:
another session, another parent. A process forked from a standby server has the server's bytes, so the
server is started with a placeholder and the forked shim writes its own marker over it, in place.
"""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from .protocol import MARKER, MARKER_ROOM

PLACEHOLDER = "standby".ljust(MARKER_ROOM, ".")


def carries(pid: int, marker: str) -> bool:
    """Whether a process was started for this attempt. False for zombies and for other users' processes."""
    try:
        block = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone meanwhile, or not ours to read
        return False
    wanted = f"{MARKER}={marker}\0".encode("utf-8", "surrogateescape")
    return block.startswith(wanted) or b"\0" + wanted in block


def marked(marker: str, pids: Iterable[int]) -> list[int]:
    return [pid for pid in pids if carries(pid, marker)]


def overwrite(marker: str) -> bool:
    """Put the marker in place of the placeholder; False when there is none or it is too small."""
    start, end = _span(50)
    block = ctypes.string_at(start, end - start)
    head = f"{MARKER}={PLACEHOLDER}\0".encode()
    at = 0 if block.startswith(head) else block.find(b"\0" + head) + 1
    value = marker.encode("utf-8", "surrogateescape")
    if (at == 0 and not block.startswith(head)) or len(value) > MARKER_ROOM:
        return False
    ctypes.memmove(start + at + len(MARKER) + 1, value.ljust(MARKER_ROOM, b"\0"), MARKER_ROOM)
    return True


def entitle(argv: Iterable[str]) -> None:
    """Show `argv` as this process's command line in ps and /proc/PID/cmdline, as far as there is room."""
    start, end = _span(48)
    room = end - start - 1  # the last byte stays 0: else the kernel reads on into the environment
    line = b"\0".join(os.fsencode(word) for word in argv)[:room]
    ctypes.memmove(start, line.ljust(room, b"\0"), room)


def _span(field: int) -> tuple[int, int]:
    """Two neighbouring addresses of /proc/self/stat; fields are counted from 1 as in proc(5)."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[field - 3]), int(fields[field - 2])
