"""How fast counters grow, over a window. Pure: times are passed in."""

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Rate:
    """One counter. It may begin anew (a driver that was loaded again): that is no growth."""

    window_s: float
    _seen: deque[tuple[float, float]] = field(default_factory=deque)

    def take(self, at: float, value: float | None) -> float:
        """The growth within the window, after this sample; 0 for what cannot be told yet."""
        if value is None:
            return self.grown
        if self._seen and value < self._seen[-1][1]:
            self._seen.clear()
        if not self._seen or at > self._seen[-1][0]:
            self._seen.append((at, value))
        while len(self._seen) > 2 and self._seen[1][0] <= at - self.window_s:
            self._seen.popleft()
        return self.grown

    @property
    def grown(self) -> float:
        return self._seen[-1][1] - self._seen[0][1] if self._seen else 0.0

    @property
    def per_s(self) -> float | None:
        """Between the last two samples; None before there are two."""
        if len(self._seen) < 2:
            return None
        (before, low), (after, high) = self._seen[-2], self._seen[-1]
        return (high - low) / (after - before)
