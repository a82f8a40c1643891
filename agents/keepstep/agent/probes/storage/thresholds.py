"""When a checkpoint folder is tried, with how much, and when it is too slow. Judgement."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    first_s: float = 10.0  # after an attempt was first seen running
    every_s: float = 60.0
    size: int = MIB
    slow_s: float = 5.0  # a megabyte
    hang_s: float = 30.0  # then its process is killed, and left behind if it cannot be
    free_bytes: int = 10 << 30
    free_bytes_bad: int = 1 << 30
