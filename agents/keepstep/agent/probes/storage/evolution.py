"""From what a trial answered to what is not well. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from keepstep.agent.probes.standing import check
from keepstep.agent.probes.storage.thresholds import Thresholds
from keepstep.core.health import Level
from keepstep.wire.health import Check


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Of one trial. `hangs_s`: it has not answered for so long."""

    took_s: float = 0.0
    hangs_s: float = 0.0
    stage: str = ""  # in which it failed
    error: str = ""
    free: int | None = None  # bytes
    total: int | None = None
    absent: bool = False  # nobody has made the folder yet


def checks(folder: str, answer: Answer, limits: Thresholds) -> Iterator[Check]:
    if answer.absent:
        return
    if answer.hangs_s >= limits.hang_s:
        text = (
            f"a write, fsync and read of {limits.size >> 10} KiB has not come back for {answer.hangs_s:.0f} s"
        )
        yield check("host.file_system_hang", folder, Level.BAD, answer.hangs_s, limits.hang_s, text)
        return
    if answer.error:
        yield check("storage.failed", folder, Level.BAD, 1, 0, f"{answer.stage}: {answer.error}")
    elif answer.took_s > limits.slow_s:
        text = f"a write, fsync and read of {limits.size >> 10} KiB took {answer.took_s:.1f} s"
        yield check("storage.slow", folder, Level.WARN, answer.took_s, limits.slow_s, text)
    if answer.free is not None and answer.total and answer.free < limits.free_bytes < answer.total / 4:
        level = Level.BAD if answer.free < limits.free_bytes_bad else Level.WARN
        text = f"{answer.free >> 20} MiB are left of {answer.total >> 20}"
        yield check("host.disk_space", folder, level, answer.free, limits.free_bytes, text)
