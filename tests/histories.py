"""Histories of healthy gangs, and of some that hang, drawn by chance; how gangs are judged is not in it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

STEPS = 10_000
SILENCES = 5  # at most, of one history


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """A rank in a phase for so long, and what one would see if one looked."""

    step: int
    phase: str
    seconds: float
    kind: str = "plain"  # plain | compile | link | pause
    hang: bool = False
    usual: bool = False  # one of the history's phases: counted with them


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """An agent that is not heard from this step on, for so long."""

    step: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    phases: dict[str, np.ndarray]  # seconds by step: what each rank's beacon counts
    stalls: tuple[Stall, ...]  # what happens beside, seldom
    silences: tuple[Silence, ...]  # of one agent, by chance at any time


def history(chance: np.random.Generator, *, hang: bool) -> History:
    step_s = float(10 ** chance.uniform(-2.0, 1.3))  # 10 ms to 20 s
    shares = chance.dirichlet((1.0, 6.0, 8.0, 3.0))
    sigma = float(chance.choice((0.05, 0.2, 0.5)))
    noise = np.exp(sigma * chance.standard_normal(STEPS, dtype=np.float32))
    noise *= _shape(chance)
    phases = {
        name: (noise * np.float32(share * step_s)).astype(np.float32)
        for name, share in zip(("data", "forward", "backward", "optimizer"), shares, strict=True)
    }
    phases["forward"][0] += chance.uniform(0.0, 120.0)  # the first one loads and compiles
    stalls = list(_stalls(chance, step_s))
    if hang:
        phase = str(chance.choice(("forward", "backward", "optimizer", "data")))
        stalls.append(Stall(step=int(chance.integers(20, STEPS)), phase=phase, seconds=np.inf, hang=True))
    silences = (
        Silence(step=int(chance.integers(1, STEPS)), seconds=chance.uniform(1.0, 14.0))
        for _ in range(chance.integers(1, SILENCES + 1))
    )
    return History(
        phases=phases,
        stalls=tuple(sorted(stalls, key=lambda stall: stall.step)),
        silences=tuple(sorted(silences, key=lambda silence: silence.step)),
    )


def _shape(chance: np.random.Generator) -> np.ndarray:
    """How the time of a step changes over the run."""
    steps = np.arange(STEPS, dtype=np.float32)
    match chance.integers(4):
        case 0:
            return np.ones(STEPS, dtype=np.float32)
        case 1:  # sequences grow
            return np.linspace(1.0, chance.uniform(1.0, 9.0), STEPS, dtype=np.float32)
        case 2:  # long sequences among short ones
            long = chance.random(STEPS, dtype=np.float32) < chance.uniform(0.01, 0.3)
            return np.where(long, np.float32(chance.uniform(2.0, 6.0)), np.float32(1.0))
        case _:  # the machine is throttled, or shared with somebody by day
            period = float(chance.integers(50, 5000))
            busy = np.sin(steps / period) > 0
            return np.where(busy, np.float32(chance.uniform(1.2, 4.0)), np.float32(1.0))


def _stalls(chance: np.random.Generator, step_s: float) -> Iterator[Stall]:
    def at() -> int:
        return int(chance.integers(1, STEPS))

    evaluation_s, checkpoint_s = chance.uniform(1.0, 300.0), chance.uniform(0.2, 60.0)
    named = chance.random() < 0.5  # whether the script says that it evaluates
    for step in range(int(chance.integers(500, 3000)), STEPS, 1000):
        seconds = evaluation_s * chance.uniform(0.7, 1.5)
        yield Stall(step=step, phase="evaluation" if named else "none", seconds=seconds)
    for step in range(100, STEPS, 500):
        slow = chance.uniform(1.0, 3.0) if chance.random() < 0.1 else 1.0
        yield Stall(step=step, phase="checkpoint", seconds=checkpoint_s * slow)
    for _ in range(chance.integers(4)):
        yield Stall(step=at(), phase="forward", seconds=chance.uniform(2.0, 300.0), kind="compile")
    for _ in range(chance.integers(6)):
        yield Stall(step=at(), phase="data", seconds=chance.uniform(1.0, 55.0))
    for _ in range(chance.integers(3)):
        yield Stall(step=at(), phase="backward", seconds=chance.uniform(1.0, 55.0), kind="link")
    for _ in range(chance.integers(3)):
        yield Stall(step=at(), phase="forward", seconds=step_s + 3600.0, kind="pause")
