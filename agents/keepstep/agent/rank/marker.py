"""The marker: KEEPSTEP_ATTEMPT=<job>/<attempt>/<node> in the initial environment of every process of an
attempt.

The kernel shows in /proc/PID/environ the bytes that a process was started with, wherever it went since:
another session, another parent. A process forked from a standby server has the server's bytes, so the
server is started with a placeholder and the forked shim writes its own marker over it, in place.
"""

import ctypes
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from .processes import Process, read
from .protocol import MARKER, MARKER_ROOM

_LOOKS_MAX = 1000  # a process that forks as fast as it can is caught in one of some dozens
PLACEHOLDER = "standby".ljust(MARKER_ROOM, ".")


def carries(pid: int, marker: str) -> bool:
    """Whether a process was started for this attempt. False for zombies and for other users' processes."""
    try:
        block = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone meanwhile, or not ours to read
        return False
    wanted = f"{MARKER}={marker}\0".encode("utf-8", "surrogateescape")
    return block.startswith(wanted) or b"\0" + wanted in block


def bearers(markers: Iterable[str], apart_from: Collection[int] = ()) -> list[Process]:
    """Every process that carries one of these markers.

    One that forks and exits all the time is never there for long: while one looks at it, it has become
    another. So one looks again for as long as there are processes that were not there before.
    """
    wanted = tuple(markers)
    seen, found = set(apart_from), []
    for _ in range(_LOOKS_MAX):
        new = [pid for name in os.listdir("/proc") if name.isdigit() and (pid := int(name)) not in seen]  # noqa: PTH208 - hot
        if not new:
            break
        seen.update(new)
        carrying = [pid for pid in new if any(carries(pid, marker) for marker in wanted)]
        found += [process for pid in carrying if (process := read(pid)) is not None]
    return found


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
