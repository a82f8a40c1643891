"""What went wrong with an attempt that should be running, and who is to blame.

The first failure in time is the cause; peers that fell over it are collateral. Failures of one node are
ordered exactly by their shim; between nodes only ages are compared, which reports delay, so among deaths
that come close together one that looks like a peer's fault (SIGABRT of a watchdog, an error that speaks of a
peer) does not count as the cause, and alone waits a moment for word of that peer.

Silence is not failure. A gang that makes progress proves that all its ranks live, so a silent node is only
marked; the rest is ended when a node is silent *and* the gang stands still beyond its bound, or on positive
evidence of death. When no node answers at all, it is the controller that is cut off.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from keepstep.core import durations
from keepstep.core.durations import Usual, phase_of
from keepstep.core.ids import Node
from keepstep.core.states import AttemptState, NodeState
from keepstep.decide.death import alone_bound_s, orphan_lease_s
from keepstep.decide.hung import Suspicion, hung
from keepstep.decide.lying import lying
from keepstep.decide.place import count, listed
from keepstep.decide.plan import Pending, Policy, Verdict
from keepstep.decide.view import AttemptView, JobView, NodeView, PartPhase, PartView, RankPhase, RankView

Nodes = Mapping[Node, NodeView]

JOB, INFRASTRUCTURE = "job", "infrastructure"
# Of the usual longest. The full factor is for what makes a rank late: long batches, phases that drift, a
# machine that is shared. None of that keeps its agent from speaking at the same time; so where the agent is
# silent, too, twice is enough, and `silent_after_s` the floor for what stops both: a machine that pauses.
_SILENT_FACTOR = 2.0
_SIGNALS = {4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}
_FROM_OUTSIDE = frozenset({1, 2, 9, 15})  # nothing that a program does to itself by mistake
_PEER = re.compile(
    r"peer|connection (reset|closed|refused)|broken pipe|nccl|gloo|dist(backend|network|store)error"
    r"|watchdog|socket timeout",
    re.IGNORECASE,
)
_NODES_FAULT = re.compile(r"bundle|fetch|download|unreachable|timed? ?out|no space|memory", re.IGNORECASE)
_JOBS_FAULT = re.compile(
    r"command|not found|no such|cannot be (run|executed)|permission|secret|user|workdir", re.I
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exit:
    part: PartView
    rank: RankView

    @property
    def age_s(self) -> float:
        return self.rank.exited_age_s or 0.0

    @property
    def like_a_victim(self) -> bool:
        named = self.rank.exit_code == 1 and _PEER.search(self.rank.error) is not None
        return self.rank.signal == 6 or named


def judge(
    job: JobView, attempt: AttemptView, nodes: Nodes, policy: Policy, returned: bool
) -> Verdict | Pending | Suspicion | None:
    """`returned`: agents had their time to come back after this controller's start."""
    return (
        _refused(attempt)
        or lying(job, attempt)  # a rank that lies ends itself, and others fall over it
        or _crashed(attempt, nodes, policy)
        or _lost(attempt, nodes)
        or _vanished(attempt)
        or (_silent(job, attempt, nodes, policy) if returned else None)
        or _stalled(job, attempt, policy)
        or hung(job, attempt, policy)
        or _exited_early(job, attempt)
    )


def is_silent(part: PartView, node: NodeView | None) -> bool:
    return node is None or not part.heard or not node.connected or node.state is not NodeState.READY


def _refused(attempt: AttemptView) -> Verdict | None:
    part = next((part for part in attempt.parts if part.phase is PartPhase.REFUSED), None)
    if part is None:
        return None
    why = part.reason or "it does not say why"
    blame = JOB if _JOBS_FAULT.search(why) and not _NODES_FAULT.search(why) else INFRASTRUCTURE
    return Verdict(
        kind="refused",
        what=f"node {part.node} cannot run attempt {attempt.number}: {why}",
        blame=blame,
        node=part.node,
        signature=signature("refused", why),
        error=why,
    )


def _crashed(attempt: AttemptView, nodes: Nodes, policy: Policy) -> Verdict | Pending | None:
    exits = [_Exit(part=part, rank=rank) for part in attempt.parts for rank in part.ranks if rank.failed]
    if not exits:
        return None
    cause = _cause(exits, policy.settle_s)
    if cause.like_a_victim:
        elsewhere = _left_before(attempt, cause, policy) or _of_a_peer(attempt, cause, exits, nodes, policy)
        if elsewhere is not None:
            return elsewhere
    rank, others = cause.rank, len(exits) - 1
    role = f" ({attempt.layout.coordinates(rank.rank)})" if rank.rank < attempt.layout.world_size else ""
    step = f" after step {rank.step}" if rank.step >= 0 else ""
    error = f": {rank.error}" if rank.error else ""
    fell = f"; {count(others, 'peer')} fell over it" if others else ""
    lost = rank.signal is None and rank.exit_code is None  # with its shim: nobody could see it end
    outside = lost or rank.signal in _FROM_OUTSIDE
    return Verdict(
        kind="crashed",
        what=f"rank {rank.rank}{role} on {cause.part.node} died of {_how(rank)}{step}{error}{fell}",
        blame=INFRASTRUCTURE if outside else JOB,
        rank=rank.rank,
        node=cause.part.node,
        began_s=cause.age_s,
        signature=signature(_how(rank), rank.error),
        evidence=tuple(
            f"rank {one.rank.rank} on {one.part.node}: {_how(one.rank)} {one.age_s:.2f} s ago"
            + (f", {one.rank.error}" if one.rank.error else "")
            for one in sorted(exits, key=lambda one: -one.age_s)[:8]
        ),
        exit_code=rank.exit_code if rank.exit_code is not None else 128 + (rank.signal or 0),
        error=rank.error,
    )


def _cause(exits: list[_Exit], close_s: float) -> _Exit:
    """The first failure of every node, exactly; then between nodes the earliest that is not a victim."""
    first: dict[Node, _Exit] = {}
    for one in exits:
        seen = first.get(one.part.node)
        if seen is None or (one.rank.exit_order, -one.age_s) < (seen.rank.exit_order, -seen.age_s):
            first[one.part.node] = one
    earliest = max(one.age_s for one in first.values())
    close = [one for one in first.values() if earliest - one.age_s <= close_s]
    return min(close, key=lambda one: (one.like_a_victim, -one.age_s, one.rank.rank))


def _of_a_peer(
    attempt: AttemptView, cause: _Exit, exits: list[_Exit], nodes: Nodes, policy: Policy
) -> Verdict | Pending | None:
    """A death that looks like a peer's fault: the peer may be on a node that is lost, silent or just slow."""
    lost = _lost(attempt, nodes)
    if lost is not None:
        return lost
    told = {one.part.node for one in exits}
    untold = [part for part in attempt.parts if part.node not in told]
    away = [part for part in untold if _quiet(part, nodes.get(part.node), policy.settle_s)]
    bound_s = policy.silent_after_s if away else policy.settle_s
    victim = f"rank {cause.rank.rank} on {cause.part.node} died of {_how(cause.rank)}"
    if untold and cause.age_s < bound_s:
        reason = f"{victim}, like one whose peer went first: waits {bound_s:g} s for word of that peer"
        return Pending(reason=reason, due_s=bound_s - cause.age_s)
    if not away:
        return None
    names = listed([part.node for part in away])
    return _silence_verdict(
        away, f"{victim}, like one whose peer went first, and {names} is silent", cause.age_s
    )


def _left_before(attempt: AttemptView, cause: _Exit, policy: Policy) -> Verdict | None:
    """A rank that exited 0 while others still needed it: they fell over its closed connections."""
    for part in attempt.parts:
        for rank in part.ranks:
            left = rank.phase is RankPhase.EXITED and rank.exit_code == 0
            if not left or (rank.exited_age_s or 0.0) + policy.settle_s < cause.age_s:
                continue
            return Verdict(
                kind="exited early",
                what=f"rank {rank.rank} on {part.node} exited 0 after step {rank.step}, and rank "
                f"{cause.rank.rank} on {cause.part.node}, which needed it, died of {_how(cause.rank)}",
                blame=JOB,
                rank=rank.rank,
                node=part.node,
                began_s=rank.exited_age_s or 0.0,
                signature=signature("exited early", ""),
                evidence=(f"rank {cause.rank.rank} on {cause.part.node}: {cause.rank.error}",),
            )
    return None


def _quiet(part: PartView, node: NodeView | None, bound_s: float) -> bool:
    return is_silent(part, node) or (node is not None and node.silence_s > bound_s)


def _lost(attempt: AttemptView, nodes: Nodes) -> Verdict | None:
    """Positive evidence that a node is dead while something of the attempt should live on it."""
    for part in attempt.parts:
        node = nodes.get(part.node)
        if node is None or not node.confirmed or _all_done(part):
            continue
        return Verdict(
            kind="node lost",
            what=f"node {part.node} is lost: {node.confirmed}",
            blame=INFRASTRUCTURE,
            node=part.node,
            began_s=node.silence_s,
            evidence=(node.confirmed, *(("its connection was reset",) if node.reset else ())),
        )
    return None


def _vanished(attempt: AttemptView) -> Verdict | None:
    """A part ended although none of its ranks is known to have failed: its shim died, and they with it."""
    for part in attempt.parts:
        if part.phase is PartPhase.DEAD and not _all_done(part):
            why = f": {part.reason}" if part.reason else ""
            return Verdict(
                kind="crashed",
                what=f"everything of attempt {attempt.number} on {part.node} is gone{why}",
                blame=INFRASTRUCTURE,
                node=part.node,
                evidence=(part.reason,) if part.reason else (),
            )
    return None


def _silent(job: JobView, attempt: AttemptView, nodes: Nodes, policy: Policy) -> Verdict | None:
    silent = [part for part in attempt.parts if is_silent(part, nodes.get(part.node)) and not _all_done(part)]
    if not silent:
        return None
    if attempt.state is AttemptState.PREPARING:
        return _silent_preparing(attempt, silent, nodes, policy)
    ages = [_silence_s(part, nodes, attempt) for part in silent]
    if len(silent) == len(attempt.parts):
        lease_s = orphan_lease_s(job.spec, policy) + policy.fence_margin_s
        if min(ages) < lease_s:
            return None  # nobody answers: it is the controller that is cut off, and the gang probably trains
        what = f"no node of attempt {attempt.number} said a word for the orphan lease's {lease_s:g} s"
        return _silence_verdict(silent, what, min(ages))
    cut_off = _cut_off(job, attempt, dict(zip((part.node for part in silent), ages, strict=True)), policy)
    if cut_off is not None:
        return cut_off
    bound_s, silent_s = standstill_s(job, attempt, policy), _silent_enough_s(job, attempt, policy)
    still_s = _still_s(attempt)
    told = [part for part, age_s in zip(silent, ages, strict=True) if age_s >= silent_s]
    if not told or still_s < bound_s:
        return None
    names = listed([part.node for part in told])
    gang = "made no progress" if attempt.stepped else "did not come to its first step"
    word = f"{names} is silent for more than {silent_s:g} s"
    what = f"{word}, and the gang {gang} for {bound_s:g} s"
    return _silence_verdict(told, what, min(max(ages), still_s))


def _cut_off(
    job: JobView, attempt: AttemptView, silent: Mapping[Node, float], policy: Policy
) -> Verdict | None:
    """Sooner than by the bound for all gangs: every rank that can be asked waits for longer than usual.

    Not where one of them does something else, or is in a phase that nobody knows yet (a first evaluation);
    and only a node whose silence began with the waiting is its reason.
    """
    parts = [part for part in attempt.parts if part.node not in silent]
    ranks = [one for part in parts for one in part.ranks if one.phase is RankPhase.RUNNING]
    bound_s, still_s = policy.silent_after_s, min((one.still_s or 0.0 for one in ranks), default=0.0)
    for one in ranks:
        usual = job.usual.get(one.doing, Usual())
        learnt_s = durations.bound_s(phase_of(one.doing), usual, factor=_SILENT_FACTOR)
        if learnt_s is None or one.waiting_s is None:
            return None
        bound_s = max(bound_s, learnt_s)
    since_s = min(max(bound_s, still_s), policy.silent_gang_bound_s)
    told = [Node(name) for name, age_s in silent.items() if age_s >= since_s]
    if still_s < bound_s or not told:
        return None
    doing = listed(sorted({one.doing for one in ranks}))
    word = f"{listed(told)} is silent"
    what = f"{word}, and all others wait for {bound_s:.2g} s, longer than {doing} usually takes"
    return Verdict(kind="silent", what=what, blame=INFRASTRUCTURE, node=told[0], began_s=still_s)


def standstill_s(job: JobView, attempt: AttemptView, policy: Policy) -> float:
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
    return _silence_verdict(told, what, bound_s)


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


def _silence_verdict(silent: list[PartView], what: str, began_s: float) -> Verdict:
    return Verdict(kind="silent", what=what, blame=INFRASTRUCTURE, node=silent[0].node, began_s=began_s)


def _still_s(attempt: AttemptView) -> float:
    counted = attempt.progress_age_s
    return attempt.step_age_s if counted is None else min(attempt.step_age_s, counted)


def _stalled(job: JobView, attempt: AttemptView, policy: Policy) -> Verdict | None:
    if attempt.state is AttemptState.PREPARING:
        bound_s = min(job.spec.recovery.start_within_s, policy.prepare_within_s)
        late = [part for part in attempt.parts if part.phase is not PartPhase.PREPARED or not part.heard]
        late = late or [part for part in attempt.parts[:1] if part.master is None]
        what = "not prepared"
    elif attempt.state is AttemptState.STARTING:
        bound_s = policy.start_within_s
        late = [part for part in attempt.parts if part.heard and not _lives(part)]
        what = "without a sign of life of its ranks"
    else:
        return None
    if attempt.age_s < bound_s or not late:
        return None
    names = listed([part.node + (f" ({part.reason})" if part.reason else "") for part in late])
    return Verdict(
        kind="stalled start",
        what=f"{names} {what} after {bound_s:g} s",
        blame=INFRASTRUCTURE,
        node=late[0].node,
        began_s=attempt.age_s,
    )


def _lives(part: PartView) -> bool:
    seen = {rank.phase for rank in part.ranks}
    return bool(seen) and seen <= {RankPhase.RUNNING, RankPhase.EXITED}


def _exited_early(job: JobView, attempt: AttemptView) -> Verdict | None:
    """Ranks may leave one after another; one that left early shows when the others wait for it."""
    bound_s = job.spec.recovery.hang_after_s or job.spec.recovery.hang_after_unknown_s
    ranks = [_Exit(part=part, rank=rank) for part in attempt.parts for rank in part.ranks]
    left = [one for one in ranks if one.rank.phase is RankPhase.EXITED and one.rank.exit_code == 0]
    stay = [one for one in ranks if one.rank.phase is RankPhase.RUNNING]
    if not left or not stay or not attempt.stepped:
        return None
    first = max(left, key=lambda one: one.age_s)
    busy_s = min((one.rank.doing_age_s for one in stay if one.rank.doing_age_s is not None), default=bound_s)
    if min(_still_s(attempt), first.age_s, busy_s) < bound_s:
        return None
    return Verdict(
        kind="exited early",
        what=f"rank {first.rank.rank} on {first.part.node} exited 0 after step {first.rank.step}, and "
        f"{count(len(stay), 'other')} made no progress for {bound_s:g} s since",
        blame=JOB,
        rank=first.rank.rank,
        node=first.part.node,
        began_s=min(_still_s(attempt), first.age_s),
        signature=signature("exited early", ""),
    )


def _all_done(part: PartView) -> bool:
    return bool(part.ranks) and all(rank.phase is RankPhase.EXITED for rank in part.ranks)


def _how(rank: RankView) -> str:
    if rank.signal is not None:
        return _SIGNALS.get(rank.signal, f"signal {rank.signal}")
    return f"exit code {rank.exit_code}" if rank.exit_code is not None else "an unknown cause"


def signature(how: str, error: str) -> str:
    """The same for every rank, process and address: numbers are left out of the error."""
    first = error.strip().splitlines()[0] if error.strip() else ""
    return f"{how}: {re.sub(r'0x[0-9a-fA-F]+|[0-9]+', '#', first)[:160]}" if first else how
