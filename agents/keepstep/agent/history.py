"""Which folders of dead attempts are kept: the newest ones, within a bound of number and size.

An attempt whose folder goes is remembered by its number, so that it never starts again.
"""

import os
import shutil
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from keepstep.agent.folder import Folder
from keepstep.agent.settings import History

Key = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    key: Key
    path: Path
    ended: float  # newest last; a file's time, which only orders
    bytes: int


def clean(folder: Folder, limits: History, present: Set[Key]) -> None:
    """Blocking. `present`: attempts that live or are still reported; they and their jobs are left alone."""
    dead = [
        Kept(key=(job, number), path=path, ended=path.stat().st_mtime, bytes=_size(path))
        for job, number, path in folder.attempts()
        if (job, number) not in present and (path / "forgotten").exists()
    ]
    for kept in superfluous(dead, limits):
        job, number = kept.key
        if number > folder.removed(job):
            folder.write_removed(job, number)
        shutil.rmtree(kept.path, ignore_errors=True)
    jobs = {job for job, _, _ in folder.attempts()}
    for empty in folder.jobs.iterdir():
        if empty.name not in jobs:
            for workdir in empty.glob("workdir-*"):
                shutil.rmtree(workdir, ignore_errors=True)


def superfluous(dead: list[Kept], limits: History) -> list[Kept]:
    """What goes; of one job always the lower attempts before the higher ones."""
    gone: list[Kept] = []
    jobs: dict[str, list[Kept]] = {}
    for kept in dead:
        jobs.setdefault(kept.key[0], []).append(kept)
    for attempts in jobs.values():
        attempts.sort(key=lambda kept: kept.key[1])
        gone += attempts[: -limits.attempts]
        del attempts[: -limits.attempts]
    by_age = sorted(jobs.values(), key=lambda attempts: max(kept.ended for kept in attempts))
    while len(by_age) > limits.jobs:
        gone += by_age.pop(0)
    left = sum(kept.bytes for attempts in by_age for kept in attempts)
    for attempts in by_age:
        for kept in attempts:
            if left <= limits.bytes:
                return gone
            gone.append(kept)
            left -= kept.bytes
    return gone


def _size(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += (Path(folder) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total
