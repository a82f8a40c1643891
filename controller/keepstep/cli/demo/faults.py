"""Faults as they happen: a rank killed in the middle of a phase, a node gone with all that ran on it.

Which phase a rank is in is read from its beacon, a page of memory that the rank's own descriptors lead to.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keepstep.agent.rank import marker, processes
from keepstep.agent.rank.processes import Process
from keepstep.core.beacon import BeaconReader, Phase
from keepstep.core.clock import SystemClock
from keepstep.core.errors import NotFound, TimedOut

_LOOK_S = 0.0003  # a phase lasts tens of milliseconds
_BEACON = "memfd:keepstep-beacon"


@contextmanager
def beacon_of(pid: int) -> Iterator[BeaconReader]:
    """A rank's beacon. Errors: NotFound where the process has none, or is gone."""
    found = None
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if _BEACON in str(entry.readlink()):
                found = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
                break
    except OSError as error:
        raise NotFound(f"process {pid} is gone") from error
    if found is None:
        raise NotFound(f"process {pid} has no beacon")
    try:
        reader = BeaconReader.of_descriptor(found)
    finally:
        os.close(found)
    try:
        yield reader
    finally:
        reader.close()


def kill_in_phase(pid: int, phase: Phase, *, after_step: int, within_s: float) -> int:
    """Kill -9 while the rank is in `phase` of a step past `after_step`; the step that it was in."""
    clock = SystemClock()
    deadline = clock.monotonic() + within_s
    with beacon_of(pid) as beacon:
        while clock.monotonic() < deadline:
            record = beacon.read()
            if record is not None and record.phase is phase and record.step >= after_step:
                os.kill(pid, signal.SIGKILL)
                return record.step + 1
            time.sleep(_LOOK_S)
    raise TimedOut(f"process {pid} was not seen in the phase {phase.name.lower()} within {within_s:g} s")


def lose_node(folder: Path, *, within_s: float = 10.0) -> None:
    """Everything of a node is gone at once: its agent, and the shims, standby servers and ranks of its jobs.

    A power cut leaves nobody the time to speak of it. So the agent is stopped before the others are killed,
    and dies last: neither does it report them, nor does its pool find it gone while they still live.
    """
    clock = SystemClock()
    deadline = clock.monotonic() + within_s
    for agent in filter(_is_agent, of_node(folder)):
        processes.send(agent, signal.SIGSTOP)
    while left := of_node(folder):
        if clock.monotonic() > deadline:
            raise TimedOut(f"{len(left)} processes of node {folder.name} do not die")
        for process in [one for one in left if not _is_agent(one)] or left:
            processes.send(process, signal.SIGKILL)
        time.sleep(0.02)


def of_node(folder: Path) -> list[Process]:
    """Every living process of a local node: what was started for its folder, and what carries its markers."""
    name, own = os.fsencode(folder), os.getpid()
    named = [one for one in processes.table().values() if _speaks_of(name, _command_line(one.pid))]
    attempts = [path for path in folder.glob("jobs/*/*") if path.name.isdigit()]
    markers = [f"{path.parent.name}/{path.name}/{folder.name}" for path in attempts]
    found = {one.pid: one for one in (*named, *marker.bearers(markers, {own}))}
    return [one for one in found.values() if one.alive and one.pid != own]


def pss_bytes(pid: int) -> int:
    """A process's proportional share of memory: pages shared by n processes count as 1/n."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def _is_agent(process: Process) -> bool:
    return b"keepstep.agent" in _command_line(process.pid).split(b"\0")


def _speaks_of(folder: bytes, command_line: bytes) -> bool:
    return folder in command_line.split(b"\0") or folder + b"/" in command_line


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
