"""Moving a gang off nodes that their pool will take away, while their ranks can still save their state.

With time left, it moves when there is somewhere to move to; shortly before the deadline in any case, since
what is stored or in memory by then is worth more than the last steps.
"""

import math

from keepstep.decide.place import Holders, listed, place, survey
from keepstep.decide.plan import End, Policy
from keepstep.decide.view import AttemptView, JobView, View


def leave(job: JobView, attempt: AttemptView, view: View, held: Holders, policy: Policy) -> End | None:
    """End an attempt some of whose nodes will go."""
    there = {node.name: node for node in view.nodes}
    going = [there[name] for name in attempt.nodes if name in there and there[name].leaves]
    if not going:
        return None
    within_s = min(math.inf if node.leaves_in_s is None else node.leaves_in_s for node in going)
    room = place(job, survey(job, view.nodes, held, attempt.nodes), attempt.layout)
    if room is None and within_s > policy.leave_before_s:
        return None
    grace_s = min(job.spec.run.stop.grace_s, within_s / 2)
    names = listed([node.name for node in going])
    when = "" if math.isinf(within_s) else f" within {within_s:.0f} s"
    where = f"moves to {listed(room.nodes)}" if room is not None else "goes on with what is left"
    return End(
        job=job.id,
        attempt=attempt.number,
        grace_s=grace_s,
        moves=True,
        reason=f"{names} will go{when} ({going[0].leaves}): its ranks have {grace_s:g} s to save their "
        f"state, then it {where}",
    )
