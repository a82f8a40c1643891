"""What went wrong with an attempt that should be running, and who is to blame.

The first failure in time is the cause; peers that fell over it are collateral. Failures of one node are
ordered exactly by their shim; between nodes only ages are compared, which reports delay, so among deaths
that come close together one that looks like a peer's fault (SIGABRT of a watchdog, an error that speaks of a
peer) does not count as the cause, and alone waits a moment for word of that peer.

A node is dead on positive evidence; what is made of its silence is `decide.unheard`'s to say.
"""

import re
from dataclasses import dataclass

from keepstep.core.ids import Node
from keepstep.core.states import AttemptState
from keepstep.decide.hung import Suspicion, hung
from keepstep.decide.lying import lying
from keepstep.decide.place import count, listed
from keepstep.decide.plan import Pending, Policy, Verdict
from keepstep.decide.unheard import Nodes, all_done, is_silent, silence_verdict, silent, standing_s
from keepstep.decide.view import AttemptView, JobView, NodeView, PartPhase, PartView, RankPhase, RankView

JOB, INFRASTRUCTURE = "job", "infrastructure"
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
        or (silent(job, attempt, nodes, policy) if returned else None)
        or _stalled(job, attempt, policy)
        or hung(job, attempt, policy)
        or _exited_early(job, attempt)
    )


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
    return silence_verdict(
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
        if node is None or not node.confirmed or all_done(part):
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
        if part.phase is PartPhase.DEAD and not all_done(part):
            why = f": {part.reason}" if part.reason else ""
            return Verdict(
                kind="crashed",
                what=f"everything of attempt {attempt.number} on {part.node} is gone{why}",
                blame=INFRASTRUCTURE,
                node=part.node,
                evidence=(part.reason,) if part.reason else (),
            )
    return None


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
    if min(standing_s(attempt), first.age_s, busy_s) < bound_s:
        return None
    return Verdict(
        kind="exited early",
        what=f"rank {first.rank.rank} on {first.part.node} exited 0 after step {first.rank.step}, and "
        f"{count(len(stay), 'other')} made no progress for {bound_s:g} s since",
        blame=JOB,
        rank=first.rank.rank,
        node=first.part.node,
        began_s=min(standing_s(attempt), first.age_s),
        signature=signature("exited early", ""),
    )


def _how(rank: RankView) -> str:
    if rank.signal is not None:
        return _SIGNALS.get(rank.signal, f"signal {rank.signal}")
    return f"exit code {rank.exit_code}" if rank.exit_code is not None else "an unknown cause"


def signature(how: str, error: str) -> str:
    """The same for every rank, process and address: numbers are left out of the error."""
    first = error.strip().splitlines()[0] if error.strip() else ""
    return f"{how}: {re.sub(r'0x[0-9a-fA-F]+|[0-9]+', '#', first)[:160]}" if first else how
