"""Ending every process of an attempt, and what they leave in /dev/shm.

Rounds: find, note what they have mapped, kill; until nobody is found. A process can fork between being
found and being killed, so one round is never enough. multiprocessing's resource tracker is spared at
first: it removes the semaphores and segments of its dead clients and then ends by itself. Nothing here
waits: the caller decides when the next round is.
"""

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from .processes import Process, send

SPARED_NS = 1_000_000_000  # how long a resource tracker may clean up

_SHM = "/dev/shm/"  # noqa: S108 - the folder in which the C library puts semaphores and segments
_NAMES = (
    "sem.mp-*",
    "sem.loky-*",
    "psm_*",
    "torch_*",
    "nccl-*",
    "__KMP_REGISTERED_LIB_*",
)  # fmt: skip  names made by libraries for one run; whatever else is there may be meant to stay


@dataclass(frozen=True, slots=True)
class ShmFile:
    path: str
    inode: int


class Purge:
    """One attempt's end. Create it when the first kill is due; `round` until it returns 0, then `tidy`."""

    def __init__(self, cgroup: Path | None = None) -> None:
        self._cgroup = cgroup
        self._seen: set[Process] = set()
        self._first_ns: int | None = None
        self.files: set[ShmFile] = set()
        self.killed = 0

    def round(self, victims: Iterable[Process]) -> int:
        """Note and kill the living among `victims`; how many there were."""
        now = time.monotonic_ns()
        self._first_ns = self._first_ns or now
        living = [victim for victim in victims if victim.alive]
        for victim in living:
            if _identity(victim) not in self._seen:
                self.files |= shm_files(victim.pid)
        spare = now - self._first_ns < SPARED_NS
        spared = {victim.pid for victim in living if spare and is_tracker(victim.pid)}
        for victim in living:
            if victim.pid in spared:
                continue
            if send(victim, signal.SIGKILL, signal.SIGCONT) and _identity(victim) not in self._seen:
                self.killed += 1
            self._seen.add(_identity(victim))
        if self._cgroup and not spared:
            with suppress(OSError):
                (self._cgroup / "cgroup.kill").write_text("1")
        return len(living)

    def tidy(self) -> list[str]:
        """Unlink what the dead had mapped and nobody else uses. Returns the paths."""
        for process in Path("/proc").iterdir() if self.files else ():
            if process.name.isdigit():
                self.files -= shm_files(int(process.name))
        gone = []
        for file in self.files:
            with suppress(OSError):
                if Path(file.path).stat().st_ino == file.inode:
                    Path(file.path).unlink()
                    gone.append(file.path)
        if self._cgroup:
            with suppress(OSError):
                self._cgroup.rmdir()
        return gone


def is_tracker(pid: int) -> bool:
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def shm_files(pid: int) -> set[ShmFile]:
    """What a process has mapped or open of the files that libraries make in /dev/shm."""
    found = set()
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines():
            if _SHM in line:
                fields = line.split(None, 5)
                found.add(ShmFile(fields[5], int(fields[4])))
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                path = str(entry.readlink())
                if path.startswith(_SHM):
                    found.add(ShmFile(path, entry.stat().st_ino))
    return {file for file in found if any(fnmatch(os.path.basename(file.path), name) for name in _NAMES)}  # noqa: PTH119


def _identity(process: Process) -> Process:
    """The same process at any time: state and parent change."""
    return Process(process.pid, 0, "", process.start_ticks)
