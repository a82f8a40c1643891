"""Time as a fair observer counts it.

Whoever sleeps cannot blame others for having been quiet meanwhile (`keepstep.decide.silence`). All ages that
decisions see are differences of this clock.
"""

from dataclasses import dataclass

from keepstep.decide.silence import counted_s


@dataclass(slots=True)
class ObservedTime:
    """Seconds that the observer was awake for."""

    period_s: float  # of the observer's tick
    now: float = 0.0
    _last: float | None = None

    def tick(self, monotonic_s: float) -> float:
        """Move on to `monotonic_s` of the observer's clock; returns the observed time."""
        if self._last is not None:
            self.now += counted_s(monotonic_s - self._last, self.period_s)
        self._last = monotonic_s
        return self.now

    def age(self, since: float) -> float:
        return max(0.0, self.now - since)
