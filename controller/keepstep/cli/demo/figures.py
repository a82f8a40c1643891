"""What the demo comes to, and comparing two loss curves."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two loss curves, step by step."""

    max_abs: float | None  # over the steps that both have; None: there are none, or not the last one
    missing: tuple[int, ...]  # steps that one of them has no loss for

    @property
    def equal(self) -> bool:
        """Bitwise, at every step."""
        return self.max_abs == 0.0 and not self.missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    injected: int
    recovered: int
    loss: Comparison
    goodput: float
    steps: int
    steps_replayed: int
    wall_s: float
    ranks_pss_max_bytes: int  # of all ranks together

    @property
    def good(self) -> bool:
        return self.recovered == self.injected and self.loss.equal

    @property
    def verdict(self) -> str:
        if self.recovered != self.injected:
            return f"only {self.recovered} of {self.injected} faults were recovered from"
        if self.loss.max_abs:
            return f"the loss curve differs from an undisturbed run's by {self.loss.max_abs:g}"
        return f"the loss curves cannot be compared: steps {list(self.loss.missing)} are missing"

    def to_dict(self) -> dict[str, Any]:
        """As the JSON line has them."""
        figures = asdict(self)
        del figures["loss"]
        return {
            **figures,
            "loss_max_abs_difference": self.loss.max_abs,
            "loss_steps_missing": len(self.loss.missing),
        }


def curve_of(points: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Loss by step: of the newest attempt that completed the step and knows its loss."""
    known = [point for point in points if point["loss"] is not None and math.isfinite(point["loss"])]
    return {point["step"]: point["loss"] for point in sorted(known, key=lambda p: (p["step"], p["attempt"]))}


def compare(one: Mapping[int, float], other: Mapping[int, float], *, steps: int) -> Comparison:
    """Over steps 1 ... `steps`."""
    wanted = range(1, steps + 1)
    missing = tuple(step for step in wanted if step not in one or step not in other)
    if steps in missing:
        return Comparison(max_abs=None, missing=missing)
    most = max(abs(one[step] - other[step]) for step in wanted if step not in missing)
    return Comparison(max_abs=most, missing=missing)
