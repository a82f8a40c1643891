"""Ranks whose numbers cannot be true: state that changed by itself, replicas that differ, a loss of NaN.

A rank says so in its beacon (`core.beacon.Trouble`), with the step after which it was seen; the built-in
trainer then ends itself, so that nothing more is made or stored of it. What follows:

    state or weights changed    the rank's memory lies: its node is to blame, and the state of that step and
                                all later ones are good for nothing
    replicas differ             the rank in the minority; of two, nobody knows which
    loss or gradient not finite no update was made of it. The same step is tried again, from the state before
                                it; if it comes again, from the same batch and on other hardware where there
                                is any, the batch is the cause, and is left out from then on

A loss that jumps out of a robust band and stays there is only told, unless the job's policy is to act: it
heals by itself more often than a restart would mend. Where it is acted on, the job goes back to the last
state that was proved before it and takes the same batches again. If the loss jumps again, they are the cause
and left out; if it does not, it was chance or hardware, and that is told.
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
SPIKE = "lying: loss spike"
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
    proved = _proved(step - 1)
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


def _proved(step: int) -> int:
    """The last step up to `step` whose state was proved, and not by what came after it."""
    return max(step // PARITY_EVERY * PARITY_EVERY - 1, 0)


def skipped(failures: Iterable[Failure]) -> tuple[Step, ...]:
    """Steps whose batch is left out: it did harm twice."""
    steps = [one.step for one in failures if one.signature == NOT_FINITE]
    found = {step for step in steps if steps.count(step) >= _AGAIN}
    jumps = [one.step for one in failures if one.signature == SPIKE]
    for step in jumps:
        if jumps.count(step) >= _AGAIN:
            found |= _batches(step)
    return tuple(Step(step) for step in sorted(found))


def _batches(step: int) -> set[int]:
    """A loss is that of the weights before its step's update: either update may be the one that did it."""
    return {max(step - 1, 1), step}


def suspects(failures: Iterable[Failure]) -> frozenset[Node]:
    """Nodes that lied or held the gang up: others come first, as long as there are any."""
    return frozenset(
        one.node
        for one in failures
        if one.node is not None and one.signature.startswith(("lying", "slow", CUT))
    )


def jump(job: JobView, attempt: AttemptView) -> Verdict | None:
    """A loss that stays above its band; or that did not jump again where it had before."""
    found = spike(job.losses)
    before = [one for one in job.failures if one.signature == SPIKE]
    if found is None:
        return _passed(attempt, before)
    step, said = found
    if job.spec.recovery.on_loss_spike != "skip" or job.spec.run.kind != "llama":
        return Verdict(
            kind="lying", what=said, blame="job", signature="loss spike", confidence=0.5, step=step
        )
    again = any(one.step == step for one in before)
    batches = ", ".join(map(str, sorted(_batches(step))))
    then = (
        f"again, from the same batches: those of steps {batches} are the cause, and are left out from now on"
        if again
        else "it goes back, and tries the same batches again"
    )
    return Verdict(
        kind="lying",
        what=f"{said}; {then}",
        blame="job",
        signature=SPIKE,
        noticed=f"the last state that was proved before it is that of step {_proved(step - 2)}",
        confidence=0.9 if again else 0.5,
        step=step,
        not_after=_proved(step - 2),
    )


def acted_on(verdict: Verdict) -> bool:
    return verdict.signature == SPIKE


def _passed(attempt: AttemptView, before: Sequence[Failure]) -> Verdict | None:
    if not before or before[-1].attempt >= attempt.number or attempt.step < before[-1].step + _IN_A_ROW:
        return None
    last = before[-1]
    if sum(one.step == last.step for one in before) >= _AGAIN:
        return None  # its batches are left out
    what = f"the loss of step {last.step} did not jump again from the same batches: it was not the batch"
    return Verdict(
        kind="lying",
        what=f"{what} but chance, or the hardware of attempt {last.attempt}",
        blame="infrastructure",
        signature="loss spike gone",
        confidence=0.7,
        step=last.step,
    )


def spike(losses: Sequence[tuple[int, float]]) -> tuple[int, str] | None:
    """Since which step the losses lie above the band of those before, and how far; None: they do not."""
    if len(losses) < _WINDOW_MIN + _IN_A_ROW:
        return None
    values = [loss for _, loss in losses]
    first = len(losses) - _IN_A_ROW
    edge, middle = _edge(values[:first])
    if min(values[first:]) <= edge:
        return None
    while first > _WINDOW_MIN and values[first - 1] > _edge(values[: first - 1])[0]:
        first -= 1  # several steps may come at a time: where it began is what another attempt must agree with
    edge, middle = _edge(values[:first])
    step = losses[first][0]
    return step, f"the loss is {values[-1]:.3f}, above {edge:.3f} since step {step} (median {middle:.3f})"


def _edge(values: Sequence[float]) -> tuple[float, float]:
    middle = statistics.median(values)
    spread = statistics.median(abs(loss - middle) for loss in values)
    return middle + max(_BAND * spread, 0.2 * abs(middle)), middle
