"""Ranks whose numbers cannot be true: state that changed by itself, replicas that differ, a loss of NaN.

A rank says so in its beacon (`core.beacon.Trouble`), with the step after which it was seen; the built-in
trainer then ends itself, so that nothing more is made or stored of it. What follows:

    state or weights changed    the rank's memory lies: its node is to blame, and the state of that step and
                                all later ones are good for nothing
    replicas differ             the rank in the minority; of two, nobody knows which
    loss or gradient not finite no update was made of it. The same step is tried again, from the state before
                                it; if it comes again, from the same batch and on other hardware where there
                                is any, the batch is the cause, and is left out from then on

A loss that jumps out of a robust band is only told: it heals by itself more often than a restart would mend.
"""

import statistics
from collections.abc import Iterable, Sequence

from keepstep.core.beacon import Trouble
from keepstep.core.ids import Node, Step
from keepstep.decide.links import CUT
from keepstep.decide.plan import Verdict
from keepstep.decide.view import AttemptView, Failure, JobView, PartView, RankView

PARITY_EVERY = 50  # steps between two proofs that the state is what it should be
NOT_FINITE = "lying: not finite"
_AGAIN = 2  # the second time is no accident
_BAND, _WINDOW_MIN, _IN_A_ROW = 10.0, 32, 3
_WORDS = {
    Trouble.STATE_CHANGED: "its weights or moments changed between two updates: its memory lies",
    Trouble.WEIGHTS_CHANGED: "its gathered weights changed between two updates: its memory lies",
    Trouble.REPLICA_DIFFERS: "its weights differ from those of the other replicas",
}
_GRAVITY = (
    Trouble.STATE_CHANGED,
    Trouble.WEIGHTS_CHANGED,
    Trouble.REPLICA_DIFFERS,
    Trouble.NOT_FINITE_HERE,
    Trouble.NOT_FINITE,
)


def lying(job: JobView, attempt: AttemptView) -> Verdict | None:
    """The earliest trouble, and of one step the one that says most."""
    told = [
        (one.trouble_step, _GRAVITY.index(trouble), one.rank, part, one)
        for part in attempt.parts
        for one in part.ranks
        if (trouble := Trouble.of(one.trouble)) in _GRAVITY
    ]
    if not told:
        return None
    step, gravity, _, part, one = min(told, key=lambda each: each[:3])
    trouble = _GRAVITY[gravity]
    if trouble in _WORDS:
        return _changed(attempt, part, one, trouble, step)
    here = trouble is Trouble.NOT_FINITE_HERE
    origins = [each for each in told if each[:2] == (step, gravity)] if here else []
    return _not_finite(job, attempt, step, origins)


def _changed(attempt: AttemptView, part: PartView, one: RankView, trouble: Trouble, step: int) -> Verdict:
    alone = trouble is not Trouble.REPLICA_DIFFERS
    role = attempt.layout.coordinates(one.rank)
    return Verdict(
        kind="lying",
        what=f"rank {one.rank} ({role}) on {part.node} after step {step}: {_WORDS[trouble]}",
        blame="infrastructure",
        rank=one.rank,
        node=part.node,
        signature=f"lying: {trouble.name.lower().replace('_', ' ')}",
        noticed="sums of all bits after one update and before the next do not agree"
        if alone
        else "replicas compared their weights just before an update",
        confidence=1.0 if alone or attempt.layout.dp > 2 else 0.5,
        step=step,
        not_after=max(step - 1, 0),
    )


def _not_finite(
    job: JobView, attempt: AttemptView, step: int, origins: Sequence[tuple[int, int, int, PartView, RankView]]
) -> Verdict:
    before = [one for one in job.failures if one.signature == NOT_FINITE and one.step == step]
    first = origins[0] if origins else None
    where = f"{first[4].rank} on {first[3].node}" if first else ""
    replicas = sorted({attempt.layout.coordinates(each[4].rank).dp for each in origins})
    what = f"step {step} gave a loss or gradient that is not finite"
    if first:
        one = f"replica {replicas[0]}" if len(replicas) == 1 else f"{len(replicas)} replicas"
        what += f", first in {one} (rank {where})"
    if not before:
        return Verdict(
            kind="lying",
            what=f"{what}; no update was made of it, and it is tried again",
            blame="job",
            rank=first[4].rank if first else None,
            node=first[3].node if first else None,
            signature=NOT_FINITE,
            confidence=0.5,
            step=step,
            not_after=max(step - 1, 0),
        )
    then = {one.node for one in before if one.node is not None}
    now = first[3].node if first else None
    other = now is not None and bool(then) and now not in then
    hardware = f"on {now} as on {', '.join(sorted(then))}" if other and now else "from the same batch"
    proved = max((step - 1) // PARITY_EVERY * PARITY_EVERY - 1, 0)
    return Verdict(
        kind="lying",
        what=f"{what}, again, {hardware}: the batch is the cause, and is left out from now on",
        blame="job",
        rank=first[4].rank if first else None,
        node=now,
        signature=NOT_FINITE,
        noticed=f"it goes back to the last state that was proved whole, before step {proved + 1}",
        confidence=0.95 if other else 0.7,
        step=step,
        not_after=proved,
    )


def skipped(failures: Iterable[Failure]) -> tuple[Step, ...]:
    """Steps whose batch is left out: it gave nothing finite twice."""
    steps = [one.step for one in failures if one.signature == NOT_FINITE]
    return tuple(Step(step) for step in sorted(set(steps)) if steps.count(step) >= _AGAIN)


def suspects(failures: Iterable[Failure]) -> frozenset[Node]:
    """Nodes that lied or held the gang up: others come first, as long as there are any."""
    return frozenset(
        one.node
        for one in failures
        if one.node is not None and one.signature.startswith(("lying", "slow", CUT))
    )


def jump(job: JobView) -> Verdict | None:
    """A loss that stays above its band."""
    said = spike(job.losses)
    if not said:
        return None
    return Verdict(kind="lying", what=said, blame="job", signature="loss spike", confidence=0.5)


def spike(losses: Sequence[float]) -> str:
    """Says how far the last few losses lie above the band of those before; "" where they do not."""
    if len(losses) < _WINDOW_MIN + _IN_A_ROW:
        return ""
    before, last = losses[:-_IN_A_ROW], losses[-_IN_A_ROW:]
    middle = statistics.median(before)
    spread = statistics.median(abs(loss - middle) for loss in before)
    edge = middle + max(_BAND * spread, 0.2 * abs(middle))
    if min(last) <= edge:
        return ""
    return f"the loss is {last[-1]:.3f}, above {edge:.3f} for {_IN_A_ROW} steps (median {middle:.3f})"
