"""Processes as /proc shows them: who lives, who descends from whom; and the ties between parent and child.

A number is not a process: numbers are used again. Whatever is signalled is first held by a pidfd and compared
with the start time it had when it was found.
"""

import ctypes
import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    state: str  # R, S, D, T, Z, ...
    start_ticks: int  # since boot: with the pid it names a process for good

    @property
    def alive(self) -> bool:
        """A zombie is dead, unless it is a main thread that left other threads behind."""
        if self.state not in "ZX":
            return True
        try:
            return len(list(Path(f"/proc/{self.pid}/task").iterdir())) > 1
        except OSError:
            return False


def read(pid: int) -> Process | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text.rpartition(b")")[2].split()
    return Process(pid, int(fields[1]), fields[0].decode(), int(fields[19]))


def itself() -> Process:
    process = read(os.getpid())
    assert process is not None
    return process


def table() -> dict[int, Process]:
    """Every process of this machine (or of this pid namespace)."""
    found = (read(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())  # noqa: PTH208 - hot
    return {process.pid: process for process in found if process}


def descendants(root: int, among: Mapping[int, Process]) -> list[Process]:
    """Children, their children and so on, nearest first; zombies included."""
    children: dict[int, list[Process]] = {}
    for process in among.values():
        children.setdefault(process.parent, []).append(process)
    found, frontier = [], [root]
    while frontier:
        nearest = [child for parent in frontier for child in children.get(parent, ())]
        found += nearest
        frontier = [child.pid for child in nearest]
    return found


def is_alive(pid: int, start_ticks: int) -> bool:
    """Whether this very process lives."""
    process = read(pid)
    return process is not None and process.start_ticks == start_ticks and process.alive


def hold(process: Process) -> int | None:
    """A pidfd of this very process, or None when it is gone. The caller closes it."""
    try:
        held = os.pidfd_open(process.pid)
    except OSError:
        return None
    now = read(process.pid)
    if now is None or now.start_ticks != process.start_ticks:
        os.close(held)
        return None
    return held


def send(process: Process, *signals: int) -> bool:
    """Signal this very process; False when it is gone or not ours to signal.

    A process that the first of several signals has ended may be gone before the next one: it was signalled.
    """
    held = hold(process)
    if held is None:
        return False
    sent = False
    try:
        for number in signals:
            signal.pidfd_send_signal(held, number)
            sent = True
    except (ProcessLookupError, PermissionError):
        return sent
    finally:
        os.close(held)
    return True


def threads() -> int:
    """Of this process, also those that Python does not know."""
    return len(list(Path("/proc/self/task").iterdir()))


def pss_bytes(pid: int) -> int:
    """Its share of the memory it uses; 0 for what is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends, whatever session they are in."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """Be killed when the thread that forked this process ends. Dies at once if it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def restore_signals(keep_ignored: Iterable[int] = ()) -> None:
    """Every signal as a fresh process has it, none blocked."""
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP) and number not in keep_ignored:
            try:
                signal.signal(number, signal.SIG_DFL)
            except OSError:  # reserved by the C library
                continue
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _prctl(option: int, value: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
