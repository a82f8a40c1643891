"""A rank as the kernel has it: running, stopped, traced, blocked, a zombie, gone; and where it waits.

None of it needs the rank's help, so it is true of a rank that can no longer say anything. Reading takes
microseconds and never waits for the process (only the files of /proc that lock no memory map are read).
"""

import platform
from dataclasses import dataclass
from pathlib import Path

from keepstep.agent.rank import processes

_STATES = {"T": "stopped", "t": "traced", "D": "blocked", "Z": "zombie", "X": "zombie", "x": "zombie"}

# System calls that end when a file, pipe or lock lets them, by number; ranks wait for each other in others
# (futex, poll, epoll). One of them is as blocked in the kernel as a disk that does not answer.
_WAITS_ON_FILE = {
    "x86_64": {0: "read", 1: "write", 2: "open", 17: "pread64", 18: "pwrite64", 19: "readv", 20: "writev",
               72: "fcntl", 73: "flock", 74: "fsync", 75: "fdatasync", 257: "openat"},
    "aarch64": {25: "fcntl", 32: "flock", 56: "openat", 63: "read", 64: "write", 65: "readv", 66: "writev",
                67: "pread64", 68: "pwrite64", 82: "fsync", 83: "fdatasync"},
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    process: str  # running | stopped | traced | blocked | zombie | gone
    wchan: str = ""  # the kernel's function that it waits in, with the system call where that is known


def process_of(pid: int) -> str:
    """The state alone: one small read, for every report."""
    process = processes.read(pid)
    return "gone" if process is None else _STATES.get(process.state, "running")


def standing_of(pid: int) -> Standing:
    """With where it waits, and whether a debugger is attached to it."""
    process = process_of(pid)
    if process in {"gone", "zombie"}:
        return Standing(process=process)
    call = call_of(_text(pid, "syscall"), platform.machine())
    if tracer_of(_text(pid, "status")):
        process = "traced"  # somebody is looking into it: whatever it does now is theirs to say
    elif process == "running" and call:
        process = "blocked"
    where = _text(pid, "wchan").strip()
    return Standing(process=process, wchan=" ".join(word for word in (call, where) if word not in {"", "0"}))


def tracer_of(status: str) -> int:
    """The process that traces this one, from /proc/PID/status; 0: none."""
    line = next((line for line in status.splitlines() if line.startswith("TracerPid:")), "TracerPid: 0")
    return int(line.split()[1])


def call_of(syscall: str, machine: str) -> str:
    """The call on a file that the main thread waits in, from /proc/PID/syscall; "": in none, or running."""
    number = syscall.split(" ", 1)[0].strip()
    return _WAITS_ON_FILE.get(machine, {}).get(int(number), "") if number.isdecimal() else ""


def _text(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # gone, or not ours to look into
        return ""
