"""Files that a script is just writing: a gang that is ended leaves whole ones where that costs little."""

import asyncio
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from keepstep.core.clock import Clock

_LOOK_EVERY_S = 0.05  # the kernel tells nobody when another process closes a file


def writing(pid: int) -> list[str]:
    """Regular files on a disk that the process has open for writing. Empty for a process that is gone."""
    found = []
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            path = str(entry.readlink())
            if path.startswith(("/memfd:", "/dev/", "/proc/")) or path.endswith(" (deleted)"):
                continue
            flags = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split("flags:")[1].split()[0]
            if int(flags, 8) & os.O_ACCMODE and stat.S_ISREG(entry.stat().st_mode):
                found.append(path)
    except (OSError, IndexError):
        pass  # it ended meanwhile, or is somebody else's
    return found


async def let_finish(pids: Iterable[int], clock: Clock, *, within_s: float) -> None:
    """Return when none of the processes has a file open for writing, at the latest after `within_s`."""
    deadline = clock.monotonic() + within_s
    watched = list(pids)
    while clock.monotonic() < deadline and any(writing(pid) for pid in watched):  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_EVERY_S)
