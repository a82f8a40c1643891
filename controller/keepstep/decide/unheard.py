"""When a node that says nothing is taken to be the reason for a gang's standstill.

Silence is not failure. A gang that makes progress proves that all its ranks live, so a silent node is only
marked; the rest is ended when a node is silent *and* the gang stands still beyond its bound. When no node
answers at all, it is the controller that is cut off.
"""

import math
from collections.abc import Mapping

from keepstep.core import durations
from keepstep.core.durations import Usual, phase_of
from keepstep.core.ids import Node
from keepstep.core.states import AttemptState, NodeState
from keepstep.decide.death import alone_bound_s, orphan_lease_s
from keepstep.decide.place import listed
from keepstep.decide.plan import Policy, Verdict
from keepstep.decide.view import AttemptView, JobView, NodeView, PartView, RankPhase

Nodes = Mapping[Node, NodeView]


def silent(job: JobView, attempt: AttemptView, nodes: Nodes, policy: Policy) -> Verdict | None:
    """Asked only when agents had their time to come back after a controller's start."""
    quiet = [part for part in attempt.parts if is_silent(part, nodes.get(part.node)) and not all_done(part)]
    if not quiet:
        return None
    if attempt.state is AttemptState.PREPARING:
        return _silent_preparing(attempt, quiet, nodes, policy)
    ages = [_silence_s(part, nodes, attempt) for part in quiet]
    if len(quiet) == len(attempt.parts):
        lease_s = orphan_lease_s(job.spec, policy) + policy.fence_margin_s
        if min(ages) < lease_s:
            return None  # nobody answers: it is the controller that is cut off, and the gang probably trains
        what = f"no node of attempt {attempt.number} said a word for the orphan lease's {lease_s:g} s"
        return silence_verdict(quiet, what, min(ages))
    cut_off = _cut_off(job, attempt, dict(zip((part.node for part in quiet), ages, strict=True)), policy)
    if cut_off is not None:
        return cut_off
    bound_s, silent_s = _standstill_s(job, attempt, policy), _silent_enough_s(job, attempt, policy)
    still_s = standing_s(attempt)
    told = [part for part, age_s in zip(quiet, ages, strict=True) if age_s >= silent_s]
    if not told or still_s < bound_s:
        return None
    names = listed([part.node for part in told])
    gang = "made no progress" if attempt.stepped else "did not come to its first step"
    word = f"{names} is silent for more than {silent_s:g} s"
    what = f"{word}, and the gang {gang} for {bound_s:g} s"
    return silence_verdict(told, what, min(max(ages), still_s))


def _cut_off(
    job: JobView, attempt: AttemptView, quiet: Mapping[Node, float], policy: Policy
) -> Verdict | None:
    """Sooner than by the bound for all gangs: every rank that can be asked waits for longer than usual.

    `silent_after_s` is the floor, for what stops both a rank and its agent: a machine that pauses.
    Not where one of them does something else, or is in a phase that nobody knows yet (a first evaluation);
    and only a node whose silence began with the waiting is its reason.
    """
    parts = [part for part in attempt.parts if part.node not in quiet]
    ranks = [one for part in parts for one in part.ranks if one.phase is RankPhase.RUNNING]
    bound_s, still_s = policy.silent_after_s, min((one.still_s or 0.0 for one in ranks), default=0.0)
    for one in ranks:
        usual = job.usual.get(one.doing, Usual())
        learnt_s = durations.waiting_bound_s(phase_of(one.doing), usual, durations.SILENT_FACTOR)
        if learnt_s is None or one.waiting_s is None:
            return None
        bound_s = max(bound_s, learnt_s)
    since_s = min(max(bound_s, still_s), policy.silent_gang_bound_s)
    told = [Node(name) for name, age_s in quiet.items() if age_s >= since_s]
    if still_s < bound_s or not told:
        return None
    doing = listed(sorted({one.doing for one in ranks}))
    word = f"{listed(told)} is silent"
    what = f"{word}, and all others wait for {bound_s:.2g} s, longer than {doing} usually takes"
    return Verdict(kind="silent", what=what, blame="infrastructure", node=told[0], began_s=still_s)


def _standstill_s(job: JobView, attempt: AttemptView, policy: Policy) -> float:
    """For how long a gang makes no progress before a silent node of it is taken to be the reason.

    Before its first step: several times what starts took, or until the silent node has ended its ranks.
    """
    if attempt.stepped:
        return max(policy.silent_gang_bound_s, policy.step_bound_factor * attempt.step_every_s)
    starts = job.measured.starts.values()
    usual_s = policy.step_bound_factor * max(policy.start_cold_s, *starts) if starts else math.inf
    return max(
        policy.silent_gang_bound_s, min(policy.start_within_s, usual_s, alone_bound_s(job.spec, policy))
    )


def _silent_enough_s(job: JobView, attempt: AttemptView, policy: Policy) -> float:
    """Where nobody ever saw a step the gang may train unseen, until the silent node has ended its ranks."""
    seen = attempt.stepped or job.spec.run.kind == "llama" or bool(job.measured.starts)
    return max(policy.silent_gang_bound_s, 0.0 if seen else alone_bound_s(job.spec, policy))


def _silent_preparing(
    attempt: AttemptView, silent: list[PartView], nodes: Nodes, policy: Policy
) -> Verdict | None:
    """Nothing runs yet, so nothing is lost by looking for another node."""
    told = [part for part in silent if _away_s(part, nodes, attempt) >= policy.silent_gang_bound_s]
    if not told:
        return None
    names = listed([part.node for part in told])
    bound_s = policy.silent_gang_bound_s
    what = f"{names} is silent for more than {bound_s:g} s while attempt {attempt.number} is prepared"
    return silence_verdict(told, what, bound_s)


def _away_s(part: PartView, nodes: Nodes, attempt: AttemptView) -> float:
    """A connected node that has not reported the attempt yet is slow, not silent."""
    node = nodes.get(part.node)
    if node is None:
        return attempt.age_s
    return 0.0 if node.connected and node.state is NodeState.READY else node.silence_s


def _silence_s(part: PartView, nodes: Nodes, attempt: AttemptView) -> float:
    """An agent that is back and does not know the attempt is silent for as long as the gang stands."""
    node = nodes.get(part.node)
    if node is None:
        return attempt.step_age_s
    return attempt.step_age_s if node.connected and not part.heard else node.silence_s


def silence_verdict(silent: list[PartView], what: str, began_s: float) -> Verdict:
    return Verdict(kind="silent", what=what, blame="infrastructure", node=silent[0].node, began_s=began_s)


def standing_s(attempt: AttemptView) -> float:
    counted = attempt.progress_age_s
    return attempt.step_age_s if counted is None else min(attempt.step_age_s, counted)


def is_silent(part: PartView, node: NodeView | None) -> bool:
    return node is None or not part.heard or not node.connected or node.state is not NodeState.READY


def all_done(part: PartView) -> bool:
    return bool(part.ranks) and all(rank.phase is RankPhase.EXITED for rank in part.ranks)
