"""What the host tells of itself, from /proc and its own file systems. Nothing here waits for a network.

File systems that may hang are asked by the storage probe, in a process of its own.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "vfat"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    total: int  # bytes
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    point: str
    kind: str
    device: str
    writable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    at: float
    memory_total: int = 0
    memory_available: int = 0
    load_15: float = 0.0
    cpus: int = 1
    descriptors: int = 0
    descriptors_max: int = 0
    blocked: int = 0  # tasks in uninterruptible sleep now
    space: dict[str, Space] = field(default_factory=dict)  # by path
    shm: Space | None = None
    mounts: tuple[Mount, ...] = ()


def observe(folders: tuple[Path, ...], at: float, proc: Path = Path("/proc")) -> Observed:
    """`folders`: of this agent, on local disks. Errors: OSError where /proc is not as it should be."""
    memory = _meminfo(proc / "meminfo")
    mounts = _mounts((proc / "self/mountinfo").read_text(errors="replace"))
    descriptors = (proc / "sys/fs/file-nr").read_text().split()
    return Observed(
        at=at,
        memory_total=memory.get("MemTotal", 0),
        memory_available=memory.get("MemAvailable", 0),
        load_15=float((proc / "loadavg").read_text().split()[2]),
        cpus=os.cpu_count() or 1,
        descriptors=int(descriptors[0]),
        descriptors_max=int(descriptors[2]),
        blocked=_blocked((proc / "stat").read_text()),
        space={str(folder): space for folder in folders if (space := space_of(folder)) is not None},
        shm=space_of(Path("/dev/shm")),  # noqa: S108 - where libraries share memory
        mounts=mounts,
    )


def space_of(folder: Path) -> Space | None:
    try:
        found = os.statvfs(folder)
    except OSError:  # not there, or not ours to see
        return None
    return Space(total=found.f_blocks * found.f_frsize, free=found.f_bavail * found.f_frsize)


def _meminfo(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if len(words) > 2}


def _blocked(stat: str) -> int:
    line = next((line for line in stat.splitlines() if line.startswith("procs_blocked ")), "x 0")
    return int(line.split()[1])


def _mounts(text: str) -> tuple[Mount, ...]:
    """Local file systems on devices of their own, the first mount of each."""
    found: dict[str, Mount] = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 6 or len(kind) < 3 or kind[0] not in _LOCAL or not kind[1].startswith("/"):
            continue
        # A file system that the kernel has made read-only says so in its own options; a read-only bind of
        # one that is fine is somebody's wish.
        writable = "rw" in kind[2].split(",")
        found.setdefault(fields[2], Mount(point=fields[4], kind=kind[0], device=kind[1], writable=writable))
    return tuple(found.values())
