"""How long something has been silent, counted by an observer that may itself have been asleep.

The observer ticks once a period. What it has not heard of since its last tick has been silent for as long
as the tick took, but never for longer than one period: when the observer's own tick came late (a paused VM,
Ctrl-Z, a laptop's lid, a backlog after a restart), the words it missed are still on their way, so a late
tick proves one period of silence and no more. Every age in a view is counted by this rule.
"""

from dataclasses import dataclass


def counted_s(elapsed_s: float, period_s: float) -> float:
    """What `elapsed_s` since an observer's last tick counts for, when that tick was due after `period_s`."""
    assert period_s > 0, period_s
    return min(max(elapsed_s, 0.0), period_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """Of one thing that should be heard of. A value: each tick and each word gives the next one."""

    silence_s: float = 0.0

    def heard(self) -> "Silence":
        return Silence()

    def tick(self, elapsed_s: float, period_s: float) -> "Silence":
        """`elapsed_s` after the last tick by the observer's own clock; the tick was due after `period_s`."""
        return Silence(silence_s=self.silence_s + counted_s(elapsed_s, period_s))
