"""Which rank, node, stage or data loader holds a gang up, told apart before anyone is evicted.

What is compared is each rank's own time per step, its waiting for others left out: in a coupled gang all
ranks step equally fast, and only the one that never waits is slow. Peers are ranks of the same role, the
same stage and tensor shard in other replicas; where there are none, the ranks of the same stage.

    data     the time in the data phase stands out; computing is as fast as elsewhere
    node     several ranks of one node stand out and none elsewhere, or the kernel let the rank wait for a
             processor for most of what it loses
    rank     one rank stands out, with no such excuse
    stage    every rank of one pipeline stage takes longer than those of the others: the cut is uneven
    network  nobody stands out, and yet most of the step is waiting

Everything is told with what it costs the job and how sure it is. Only a node or rank is worth a swap, and
only when a spare stands by and what it would win back within the horizon is well above what the swap costs.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from keepstep.core.ids import Node, Rank
from keepstep.core.layout import Layout
from keepstep.core.states import AttemptState
from keepstep.decide.plan import Policy, Verdict
from keepstep.decide.price import warm_start_s
from keepstep.decide.view import AttemptView, JobView, RankPhase, RankView

_STANDS_OUT = 1.3  # times its peers' median ...
_LOSS_MIN_S = 0.002  # ... and by so much a step at least
_STAGE, _WAITING, _STARVED = 1.5, 0.8, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slow:
    cause: str
    ranks: tuple[Rank, ...]
    lost_s: float  # a step
    confidence: float
    why: str


def slow(job: JobView, attempt: AttemptView) -> Verdict | None:
    """A finding; whether it is acted on is `worth_a_swap`'s to say."""
    if attempt.state is not AttemptState.RUNNING:
        return None
    ranks = {one.rank: one for part in attempt.parts for one in part.ranks}
    paces = [one for one in ranks.values() if one.pace is not None and one.phase is RankPhase.RUNNING]
    if len(paces) < attempt.layout.world_size or len(paces) < 2:
        return None
    nodes = {one.rank: part.node for part in attempt.parts for one in part.ranks}
    found = _data(ranks, attempt.layout) or _computing(ranks, attempt.layout, nodes) or _network(ranks)
    if found is None:
        return None
    step_s = max(one.pace.step_s for one in paces if one.pace)
    share = min(found.lost_s / step_s, 0.99) if step_s > 0 else 0.0
    rank = found.ranks[0] if len(found.ranks) == 1 else None
    where = {nodes[one] for one in found.ranks}
    node = next(iter(where)) if len(where) == 1 and found.cause in ("rank", "node", "data") else None
    return Verdict(
        kind="slow",
        what=f"{found.why}; the job loses {share:.0%} of its speed",
        blame="infrastructure" if found.cause in ("rank", "node", "network") else "job",
        rank=rank,
        node=node,
        signature=f"slow: {found.cause}" + (f" {rank}" if rank is not None else ""),
        confidence=found.confidence,
        slowdown=share,
        evidence=tuple(_line(ranks[one]) for one in sorted(ranks)[:16]),
    )


def worth_a_swap(job: JobView, attempt: AttemptView, verdict: Verdict, policy: Policy) -> bool:
    """Time that the job would win back within the horizon, against what the swap loses."""
    one = verdict.signature.split()[1] in ("rank", "node") and verdict.node is not None
    if not one or not attempt.spares or verdict.confidence < policy.swap_confidence_min:
        return False
    cost_s = warm_start_s(job, policy) + policy.swap_s
    return (verdict.slowdown or 0.0) * policy.slow_horizon_s > policy.swap_gain_min * cost_s


def _data(ranks: Mapping[Rank, RankView], layout: Layout) -> _Slow | None:
    out = _outstanding(ranks, layout, lambda one: one.pace.data_s if one.pace else 0.0)
    if not out:
        return None
    rank, lost_s = max(out, key=lambda each: each[1])
    why = f"rank {rank} waits {lost_s * 1e3:.0f} ms a step longer for its data than its peers"
    return _Slow(cause="data", ranks=(rank,), lost_s=lost_s, confidence=0.9, why=why)


def _computing(ranks: Mapping[Rank, RankView], layout: Layout, nodes: Mapping[Rank, Node]) -> _Slow | None:
    out = _outstanding(ranks, layout, lambda one: one.pace.own_s if one.pace else 0.0)
    if not out:
        return _stage(ranks, layout)
    worst, lost_s = max(out, key=lambda each: each[1])
    slow_ranks = tuple(sorted(rank for rank, _ in out))
    where = {nodes[rank] for rank in slow_ranks}
    pace = ranks[worst].pace
    starved = pace is not None and pace.starved_s > _STARVED * lost_s
    node = nodes[worst]
    if starved:
        lost = f"{lost_s * 1e3:.0f} ms a step"
        why = f"rank {worst} on {node} loses {lost} waiting for a processor that others use"
        return _Slow(cause="node", ranks=(worst,), lost_s=lost_s, confidence=0.9, why=why)
    if len(slow_ranks) > 1 and len(where) == 1:
        why = f"all that is slow is on {node}: ranks {', '.join(map(str, slow_ranks))}"
        return _Slow(cause="node", ranks=slow_ranks, lost_s=lost_s, confidence=0.9, why=why)
    if len(slow_ranks) > 1:
        return None  # slow here and there: noise, or a job that is uneven by itself
    why = f"rank {worst} on {node} computes {lost_s * 1e3:.0f} ms a step longer than its peers"
    return _Slow(cause="rank", ranks=(worst,), lost_s=lost_s, confidence=0.8, why=why)


def _stage(ranks: Mapping[Rank, RankView], layout: Layout) -> _Slow | None:
    if layout.pp < 2:
        return None
    own: dict[int, list[float]] = {}
    for one in ranks.values():
        if one.pace is not None:
            own.setdefault(layout.coordinates(one.rank).pp, []).append(one.pace.own_s)
    medians = {stage: statistics.median(each) for stage, each in own.items()}
    stage = max(medians, key=lambda each: medians[each])
    rest = statistics.median(value for each, value in medians.items() if each != stage)
    if medians[stage] < _STAGE * rest or medians[stage] - rest < _LOSS_MIN_S:
        return None
    members = tuple(rank for rank in sorted(ranks) if layout.coordinates(rank).pp == stage)
    times = medians[stage] / max(rest, 1e-9)
    why = f"stage {stage} of the pipeline takes {times:.1f} times as long as the others"
    lost_s = (medians[stage] - rest) * (layout.pp - 1) / layout.pp
    return _Slow(cause="stage", ranks=members, lost_s=lost_s, confidence=0.8, why=why)


def _network(ranks: Mapping[Rank, RankView]) -> _Slow | None:
    shares = [
        one.pace.waited_s / one.pace.step_s for one in ranks.values() if one.pace and one.pace.step_s > 0
    ]
    if not shares or min(shares) < _WAITING:
        return None
    lost_s = min(one.pace.waited_s for one in ranks.values() if one.pace)
    why = f"every rank waits for {min(shares):.0%} of its time, though none is slower than its peers"
    return _Slow(cause="network", ranks=tuple(sorted(ranks)), lost_s=lost_s, confidence=0.5, why=why)


def _outstanding(
    ranks: Mapping[Rank, RankView], layout: Layout, of: Callable[[RankView], float]
) -> Sequence[tuple[Rank, float]]:
    """Ranks that take clearly longer than their peers, and by how much."""
    out = []
    for rank, one in ranks.items():
        peers = [each for each in layout.group("dp", rank) if each != rank]
        peers = peers or [each for each in layout.group("tp", rank) if each != rank]
        usual = statistics.median(of(ranks[each]) for each in peers if each in ranks) if peers else None
        if usual is None:
            continue
        lost_s = of(one) - usual
        if lost_s > _LOSS_MIN_S and of(one) > _STANDS_OUT * usual:
            out.append((rank, lost_s))
    return out


def _line(one: RankView) -> str:
    pace = one.pace
    if pace is None:
        return f"rank {one.rank}: not measured"
    figures = (
        ("computes", pace.own_s),
        ("data", pace.data_s),
        ("waits", pace.waited_s),
        ("without a processor", pace.starved_s),
    )
    return f"rank {one.rank}: " + ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in figures)
