"""What the demo comes to, and comparing two loss curves."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    injected: int
    recovered: int
    loss_max_abs_difference: float | None  # None: the curves do not even have the same steps
    goodput: float
    steps: int
    steps_replayed: int
    wall_s: float
    ranks_pss_max_bytes: int  # of all ranks together

    @property
    def good(self) -> bool:
        return self.recovered == self.injected and self.loss_max_abs_difference == 0.0

    @property
    def verdict(self) -> str:
        if self.recovered != self.injected:
            return f"only {self.recovered} of {self.injected} faults were recovered from"
        if self.loss_max_abs_difference is None:
            return "the loss curves do not have the same steps"
        return f"the loss curve differs from an undisturbed run's by {self.loss_max_abs_difference:g}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def curve_of(points: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Loss by step: of the newest attempt that completed the step. A loss that is no number is nan."""
    newest = sorted(points, key=lambda point: (point["step"], point["attempt"]))
    return {point["step"]: math.nan if point["loss"] is None else point["loss"] for point in newest}


def max_difference(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """None where the two cannot be compared: other steps, or a loss that is no number."""
    if not one or set(one) != set(other):
        return None
    most = max(abs(one[step] - other[step]) for step in one)
    return None if any(math.isnan(abs(one[step] - other[step])) for step in one) else most
