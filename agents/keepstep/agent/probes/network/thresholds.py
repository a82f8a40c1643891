"""From when on a network is said not to be well. Judgement."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    errors_per_min: float = 60.0
    flaps_per_h: float = 3.0
    infiniband_per_min: float = 30.0
    unreachable: int = 2  # tries in a row that a buddy did not take
