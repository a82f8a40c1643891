"""Time and chance, passed in. The only module that asks the system for either.

Monotonic time is for decisions and never leaves its machine; wall time is for people.
"""

import random
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since an arbitrary moment, on this machine, never backwards."""
        ...

    def wall(self) -> float:
        """Seconds since 1970, UTC. For people and for rows of the store, never for a decision."""
        ...


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


@dataclass(slots=True)
class ManualClock:
    """A clock that tests and the simulator move by hand."""

    now: float = 0.0
    epoch: float = 1_700_000_000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.epoch + self.now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


def system_random() -> random.Random:
    """Chance for identifiers and jitter, seeded by the system."""
    return random.Random(secrets.randbits(128))  # noqa: S311 - not for secrets, which use `secrets`


def boot_id() -> str:
    """Tells two boots of one machine apart: ages of one boot mean nothing in the next."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
