"""When a gang leaves nodes that drain: as soon as that costs little, shortly before the deadline in any case.

Nodes drain because they are sick, because a person asked for it, or because their pool will take them away.
It costs little when there is somewhere to move to and the newest state is in memory or has just been stored.
Until then the gang trains on. Its ranks have their time to save their state, as far as the deadline leaves
them any, and the ladder brings them back without those nodes: job and node are repaired at the same time.
"""

from keepstep.core.states import AttemptState, LifeState
from keepstep.decide.life import KEEPSTEP
from keepstep.decide.place import Holders, listed, place, survey
from keepstep.decide.plan import End, Policy, Verdict, Wait
from keepstep.decide.recover import keeps_checkpoints, moment
from keepstep.decide.view import AttemptView, JobView, NodeView, View

LEAVES = "leaves "  # how the reason of a job begins whose node drains


def leave(job: JobView, attempt: AttemptView, view: View, held: Holders, policy: Policy) -> End | Wait | None:
    """End the attempt, say what it waits for, or nothing where no node of it drains."""
    there = {node.name: node for node in view.nodes}
    nodes = [there[name] for name in attempt.nodes if name in there]
    going = [node for node in nodes if node.life is LifeState.DRAINING]
    runs = attempt.state is AttemptState.RUNNING
    if not going or job.spec.validates:
        if job.reason.startswith(LEAVES) and runs:
            reason = f"attempt {attempt.number} goes on: none of its nodes drains any more"
            return Wait(job=job.id, reason=reason)
        return None
    left_s = min(node.drain_s or 0.0 for node in going)
    room = place(job, survey(job, view.nodes, held, attempt.nodes), attempt.layout)
    unbegun = not runs and keeps_checkpoints(job)
    now = "no step is lost" if unbegun else moment(job, attempt, 0.0, policy)
    if room is not None and now is not None:
        return _end(job, attempt, going, left_s, f"moves to {listed(room.nodes)}; {now}")
    if left_s <= policy.leave_before_s:
        where = f"moves to {listed(room.nodes)}" if room is not None else "goes on with what is left"
        return _end(job, attempt, going, left_s, where)
    if not runs:
        return None  # it comes to its first step meanwhile
    what = "after its next checkpoint" if room is not None else "when nodes can take their place"
    names = listed([node.name for node in going])
    reason = f"{LEAVES}{names} {what}, {policy.leave_before_s:g} s before the deadline otherwise"
    return Wait(job=job.id, reason=reason, due_s=left_s - policy.leave_before_s)


def _end(job: JobView, attempt: AttemptView, going: list[NodeView], left_s: float, then: str) -> End:
    grace_s = min(job.spec.run.stop.grace_s, left_s / 2)
    names = listed([node.name for node in going])
    within = f"within {left_s:.0f} s" if left_s > 0 else "now"
    saves = f"its ranks have {grace_s:g} s to save their state, then it " if grace_s else "it "
    return End(
        job=job.id,
        attempt=attempt.number,
        grace_s=grace_s,
        moves=True,
        verdict=_sick(going),
        reason=f"{names} drains {within} ({going[0].life_why}): {saves}{then}",
    )


def _sick(going: list[NodeView]) -> Verdict | None:
    """What keepstep itself has found is an incident. What people and pools wish is none."""
    sick = [node for node in going if node.life_by == KEEPSTEP]
    if not sick:
        return None
    first = sick[0]
    return Verdict(
        kind="sick node",
        what=f"{first.name} drains: {first.life_why}",
        blame="infrastructure",
        node=first.name,
        noticed=first.life_why,
        evidence=tuple(f"{node.name}: {node.life_why}" for node in sick),
    )
