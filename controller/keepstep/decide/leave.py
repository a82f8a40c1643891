"""When a gang leaves a node that is draining: as soon as that costs little, at the deadline at the latest.

Little means that a node stands by or is free, and that the newest state is in memory or has just been stored.
Until then the gang trains on. Its attempt is ended with the node as the reason, and the present ladder brings
it back without that node: the job and the node are repaired at the same time.
"""

from keepstep.core.ids import Node
from keepstep.core.states import AttemptState, LifeState
from keepstep.decide.place import Holders, listed, survey
from keepstep.decide.plan import End, Policy, Verdict, Wait
from keepstep.decide.recover import moment
from keepstep.decide.view import AttemptView, JobView, NodeView, View

LEAVES = "leaves "  # how the reason of a job begins whose node drains


def leave(job: JobView, attempt: AttemptView, view: View, held: Holders, policy: Policy) -> End | Wait | None:
    """End the attempt, say what it waits for, or nothing where no node of it drains."""
    nodes = {node.name: node for node in view.nodes}
    going = [nodes[part.node] for part in attempt.parts if _drains(nodes.get(part.node))]
    if not going or job.spec.validates:
        if job.reason.startswith(LEAVES) and attempt.state is AttemptState.RUNNING:
            reason = f"attempt {attempt.number} goes on: none of its nodes drains any more"
            return Wait(job=job.id, reason=reason)
        return None
    names = [node.name for node in going]
    due_s = min(node.drain_s or 0.0 for node in going)
    if due_s <= 0:
        return _end(job, attempt, going, "the drain's deadline")
    others = {part.node for part in attempt.parts}
    free = [
        node.name for node in survey(job, view.nodes, held, attempt.spares).free if node.name not in others
    ]
    if len(free) < len(going):
        if attempt.state is not AttemptState.RUNNING:
            return None  # it comes to its first step meanwhile
        reason = f"{LEAVES}{listed(names)} when a node can take its place, at the drain's deadline otherwise"
        return Wait(job=job.id, reason=reason, due_s=due_s)
    instead = free[: len(going)]
    if attempt.state is not AttemptState.RUNNING:
        return _end(job, attempt, going, f"{listed(instead)} can take its place, and no step is lost")
    now = moment(job, attempt, 0.0, policy)
    if now is not None:
        return _end(job, attempt, going, f"{listed(instead)} takes its place; {now}")
    reason = f"{LEAVES}{listed(names)} after its next checkpoint, at the drain's deadline otherwise"
    return Wait(job=job.id, reason=reason, due_s=due_s)


def _drains(node: NodeView | None) -> bool:
    return node is not None and node.life is LifeState.DRAINING


def _end(job: JobView, attempt: AttemptView, going: list[NodeView], why: str) -> End:
    first = going[0]
    names: list[Node] = [node.name for node in going]
    what = f"{listed(names)} drains: {first.life_why}"
    verdict = Verdict(
        kind="sick node", what=what, blame="infrastructure", node=first.name, noticed=first.life_why,
        evidence=tuple(f"{node.name}: {node.life_why}" for node in going),
    )  # fmt: skip
    return End(job=job.id, attempt=attempt.number, verdict=verdict, reason=f"{what}; {why}")
