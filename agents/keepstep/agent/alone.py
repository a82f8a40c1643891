"""What an agent does with its ranks when nobody answers it. Pure: levels in, a verdict out.

A job outlives its control plane, so losing the controller ends nothing by itself. Two bounds keep two
attempts from running at once all the same: ranks that stand still while nobody answers are ended after the
job's `self_fence` (the controller counts the same and a margin before it starts them elsewhere), and ranks
that go on stepping are left alone for the `orphan_lease`, which they renew by themselves while the checkpoint
folder still names their attempt.

An observer whose own tick came late (a paused machine, Ctrl-Z) has counted one period of silence, no more.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Solitude:
    """For how long nobody has answered, and nothing has moved. Seconds that the observer was awake for."""

    alone_s: float = 0.0  # since the last report that was acknowledged was sent
    still_s: float = 0.0  # since a rank of the attempt completed a step, or since its start
    leased_s: float = 0.0  # of `alone_s`, since the orphan lease was last renewed

    @property
    def unfenced_s(self) -> float:
        """No controller and no step for this long."""
        return min(self.alone_s, self.still_s)

    def tick(
        self, elapsed_s: float, period_s: float, *, answered_s: float | None = None, stepped: bool = False
    ) -> "Solitude":
        """One look later. `answered_s`: an acknowledgement came, of a report that was sent that long ago."""
        passed = min(max(0.0, elapsed_s), period_s)
        alone = self.alone_s + passed
        leased = self.leased_s + passed
        if answered_s is not None:
            # A report that was sent before a long pause and is answered after it counts by the same rule.
            alone = min(alone, max(0.0, answered_s))
            leased = alone
        return Solitude(alone_s=alone, still_s=0.0 if stepped else self.still_s + passed, leased_s=leased)

    def renewed(self) -> "Solitude":
        return replace(self, leased_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    lease_s: float  # of the controller: without an answer for this long the agent knows that it is alone
    self_fence_s: float | None  # None: late writes do no harm
    orphan_lease_s: float
    attached: bool  # belongs to a terminal: nothing will be started elsewhere


@dataclass(frozen=True, slots=True)
class GoOn:
    pass


@dataclass(frozen=True, slots=True)
class LookAtFence:
    """Whether the checkpoint folder names a newer attempt decides."""


@dataclass(frozen=True, slots=True)
class Renew:
    reason: str


@dataclass(frozen=True, slots=True)
class End:
    reason: str


Verdict = GoOn | LookAtFence | Renew | End


def judge(now: Solitude, bounds: Bounds, *, attempt: int) -> GoOn | LookAtFence | End:
    """What silence alone says; `judge_fence` goes on where it takes a look at the checkpoint folder."""
    if bounds.attached:
        return GoOn()
    if bounds.self_fence_s is not None and now.unfenced_s >= bounds.self_fence_s:
        return End(
            f"no controller for {now.alone_s:.0f} s and no step for {now.still_s:.0f} s: "
            f"attempt {attempt} ends itself, since it may be started elsewhere"
        )
    if now.alone_s >= min(bounds.lease_s, bounds.orphan_lease_s):
        return LookAtFence()
    return GoOn()


def judge_fence(now: Solitude, bounds: Bounds, *, attempt: int, fence: int | None) -> GoOn | Renew | End:
    """`fence`: the newest attempt that the checkpoint folder names; None: none, or it is not to be read."""
    if fence is not None and fence > attempt:
        return End(f"the checkpoint folder names attempt {fence}: attempt {attempt} was replaced")
    if now.leased_s < bounds.orphan_lease_s:
        return GoOn()
    stepping = now.still_s < bounds.orphan_lease_s
    if fence == attempt and stepping:
        return Renew(f"no controller for {now.alone_s:.0f} s, but the checkpoint folder names this attempt")
    why = "nothing says that it is still wanted" if stepping else f"no step for {now.still_s:.0f} s"
    return End(f"no controller for {now.alone_s:.0f} s (the orphan lease) and {why}")
