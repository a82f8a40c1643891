"""Which rank, node, link, stage or data loader holds a gang up, told apart before anyone is evicted.

What is compared is each rank's own time per step, its waiting for others left out: in a coupled gang all
ranks step equally fast, and only the one that never waits is slow. Peers are ranks of the same role, the
same stage and tensor shard in other replicas; where there are none, the ranks of the same stage.

    gc       Python's garbage collection takes most of what stands out, or much of every rank's step
    data     the time in the data phase stands out, more than computing; or all ranks wait for their data
    node     several ranks of one node stand out and none elsewhere, or the kernel let the rank wait for a
             processor for most of what it loses
    rank     one rank stands out, with no such excuse; where its GPU's driver knows why, that is said
    stage    every rank of one pipeline stage takes longer than those of the others: the cut is uneven
    link     nobody stands out, and yet most of the step is waiting, or much more of it than in this gang's
             best moments; and the kernels' round trips say between which nodes
    network  the same, and no link stands out either

Everything is told with what it costs the job and how sure it is. Only a node or rank is worth a swap, and
only when a spare stands by and what it would win back within the horizon is well above what the swap costs.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from keepstep.core.ids import Node, Rank
from keepstep.core.layout import Layout
from keepstep.core.states import AttemptState
from keepstep.decide import links
from keepstep.decide.hindrance import hindrance
from keepstep.decide.hung import Suspicion
from keepstep.decide.plan import Policy, Verdict
from keepstep.decide.price import warm_start_s
from keepstep.decide.view import AttemptView, Gpu, JobView, Pace, RankPhase, RankView

_STANDS_OUT = 1.3  # times its peers' median ...
_LOSS_MIN_S = 0.002  # ... and by so much a step at least
_STAGE, _WAITING, _STARVED = 1.5, 0.8, 0.5
_SHARED = 0.25  # of every rank's step: too much for data or garbage, though nobody stands out
_SLOWED = 0.3  # of the step: waiting that was not there in the gang's best moments


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slow:
    cause: str
    ranks: tuple[Rank, ...]
    lost_s: float  # a step
    confidence: float
    why: str
    node: Node | None = None
    names: str = ""  # what the signature ends in, where it is not the one rank


def slow(job: JobView, attempt: AttemptView, policy: Policy) -> Verdict | Suspicion | None:
    """A finding, or that links must be looked at first; what is done about it is `worth_a_swap`'s to say."""
    if attempt.state is not AttemptState.RUNNING:
        return None
    ranks = {one.rank: one for part in attempt.parts for one in part.ranks}
    paces = {rank: one.pace for rank, one in ranks.items() if one.pace and one.phase is RankPhase.RUNNING}
    if len(paces) < attempt.layout.world_size or len(paces) < 2:
        return None
    nodes = {one.rank: part.node for part in attempt.parts for one in part.ranks}
    gpus = {rank: one.gpu for rank, one in ranks.items() if one.gpu is not None}
    found: _Slow | Suspicion | None = (
        _of_one(paces, attempt.layout, nodes, gpus) or _of_all(paces) or _stage(paces, attempt.layout)
    )
    if found is None:
        found = _network(job, attempt, paces, nodes, policy)
    return _told(found, ranks, nodes) if isinstance(found, _Slow) else found


def _told(found: _Slow, ranks: Mapping[Rank, RankView], nodes: Mapping[Rank, Node]) -> Verdict:
    step_s = max(one.pace.step_s for one in ranks.values() if one.pace)
    share = min(found.lost_s / step_s, 0.99) if step_s > 0 else 0.0
    rank = found.ranks[0] if len(found.ranks) == 1 else None
    where = {nodes[one] for one in found.ranks}
    alone = len(where) == 1 and found.cause in ("rank", "node", "data", "gc")
    names = found.names or ("" if rank is None else str(rank))
    return Verdict(
        kind="slow",
        what=f"{found.why}; the job loses {share:.0%} of its speed",
        blame="infrastructure" if found.cause in ("rank", "node", "link", "network") else "job",
        rank=rank,
        node=found.node or (next(iter(where)) if alone else None),
        signature=f"slow: {found.cause} {names}".rstrip(),
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


Paces = Mapping[Rank, Pace]


def _of_one(
    paces: Paces, layout: Layout, nodes: Mapping[Rank, Node], gpus: Mapping[Rank, Gpu]
) -> _Slow | None:
    """A rank, or a node, that its peers wait for: by whatever it loses most."""
    data = _outstanding(paces, layout, lambda one: one.data_s)
    own = _outstanding(paces, layout, lambda one: one.own_s)
    garbage = _outstanding(paces, layout, lambda one: one.collected_s)
    lost_s = max((lost for _, lost in (*data, *own)), default=0.0)
    if garbage:
        rank, collecting_s = max(garbage, key=lambda each: each[1])
        if collecting_s > _STARVED * lost_s:
            took = f"{collecting_s * 1e3:.0f} ms a step longer than its peers"
            why = f"rank {rank} on {nodes[rank]} collects Python's garbage for {took}"
            return _Slow(cause="gc", ranks=(rank,), lost_s=collecting_s, confidence=0.9, why=why)
    if data and max(lost for _, lost in data) >= lost_s:
        rank, lost_s = max(data, key=lambda each: each[1])
        why = f"rank {rank} waits {lost_s * 1e3:.0f} ms a step longer for its data than its peers"
        return _Slow(cause="data", ranks=(rank,), lost_s=lost_s, confidence=0.9, why=why)
    return _computing(own, paces, layout, nodes, gpus)


def _computing(
    out: Sequence[tuple[Rank, float]],
    paces: Paces,
    layout: Layout,
    nodes: Mapping[Rank, Node],
    gpus: Mapping[Rank, Gpu],
) -> _Slow | None:
    if not out:
        return None
    worst, lost_s = max(out, key=lambda each: each[1])
    slow_ranks = tuple(sorted(rank for rank, _ in out))
    where = {nodes[rank] for rank in slow_ranks}
    node = nodes[worst]
    # On a machine that is busy with other things every rank is starved of some: more than others counts.
    if _beyond(paces, layout, worst, lambda one: one.starved_s) > _STARVED * lost_s:
        lost = f"{lost_s * 1e3:.0f} ms a step"
        why = f"rank {worst} on {node} loses {lost} waiting for a processor that others use"
        return _Slow(cause="node", ranks=(worst,), lost_s=lost_s, confidence=0.9, why=why)
    held = hindrance(worst, gpus)
    because = f"; {held}" if held else ""
    if len(slow_ranks) > 1 and len(where) == 1:
        why = f"all that is slow is on {node}: ranks {', '.join(map(str, slow_ranks))}{because}"
        return _Slow(cause="node", ranks=slow_ranks, lost_s=lost_s, confidence=0.9, why=why)
    if len(slow_ranks) > 1:
        return None  # slow here and there: noise, or a job that is uneven by itself
    why = f"rank {worst} on {node} computes {lost_s * 1e3:.0f} ms a step longer than its peers{because}"
    sure = 0.95 if held else 0.8
    return _Slow(cause="rank", ranks=(worst,), lost_s=lost_s, confidence=sure, why=why)


def _of_all(paces: Paces) -> _Slow | None:
    """Nobody stands out, and every rank gives much of its step to the same."""
    step_s = max(one.step_s for one in paces.values())
    everybody = tuple(sorted(paces))
    garbage_s = min(one.collected_s for one in paces.values())
    if garbage_s > max(_SHARED * step_s, _LOSS_MIN_S):
        why = f"every rank collects Python's garbage for {garbage_s * 1e3:.0f} ms of each step"
        return _Slow(cause="gc", ranks=everybody, lost_s=garbage_s, confidence=0.9, why=why)
    data_s = min(one.data_s for one in paces.values())
    if data_s > max(_SHARED * step_s, _LOSS_MIN_S):
        why = f"every rank waits for its data for {data_s * 1e3:.0f} ms of each step"
        return _Slow(cause="data", ranks=everybody, lost_s=data_s, confidence=0.8, why=why)
    return None


def _stage(paces: Paces, layout: Layout) -> _Slow | None:
    if layout.pp < 2:
        return None
    own: dict[int, list[float]] = {}
    for rank, pace in paces.items():
        own.setdefault(layout.coordinates(rank).pp, []).append(pace.own_s)
    medians = {stage: statistics.median(each) for stage, each in own.items()}
    stage = max(medians, key=lambda each: medians[each])
    rest = statistics.median(value for each, value in medians.items() if each != stage)
    if medians[stage] < _STAGE * rest or medians[stage] - rest < _LOSS_MIN_S:
        return None
    members = tuple(rank for rank in sorted(paces) if layout.coordinates(rank).pp == stage)
    times = medians[stage] / max(rest, 1e-9)
    why = f"stage {stage} of the pipeline takes {times:.1f} times as long as the others"
    lost_s = (medians[stage] - rest) * (layout.pp - 1) / layout.pp
    return _Slow(cause="stage", ranks=members, lost_s=lost_s, confidence=0.8, why=why)


def _network(
    job: JobView, attempt: AttemptView, paces: Paces, nodes: Mapping[Rank, Node], policy: Policy
) -> _Slow | Suspicion | None:
    """Everybody waits: for links, if the kernels at their ends say so."""
    step_s = max(one.step_s for one in paces.values())
    waited_s = min(one.waited_s for one in paces.values())
    least = [one.waited_least_s for one in paces.values()]
    grown_s = min(one.waited_s - (one.waited_least_s or 0.0) for one in paces.values())
    grown = None not in least and grown_s > max(_SLOWED * step_s, _LOSS_MIN_S)
    if not grown and waited_s < _WAITING * step_s:
        return None
    if not grown and any(signature.startswith(("slow: link", "slow: network")) for signature in job.found):
        return None  # it waits as it always did, and that was told
    looks = [one for one in job.examined if one.attempt == attempt.number]
    if not looks or looks[-1].age_s > policy.examine_again_s:
        reason = "every rank waits, and none is slower than its peers: looks at the links between them"
        return None if job.examining else Suspicion(reason=reason, nodes=attempt.nodes, stacks=False)
    lost_s = grown_s if grown else waited_s
    share = f"every rank waits for {waited_s / step_s:.0%} of its time"
    bad = links.slow_ones(links.links(looks[-1].findings, nodes))
    everybody = tuple(sorted(paces))
    if not bad:
        why = f"{share}, though none is slower than its peers"
        return _Slow(cause="network", ranks=everybody, lost_s=lost_s, confidence=0.5, why=why)
    node = links.in_common(bad)
    if node is not None:
        why = f"{share}, for what goes to and from {node}: {links.told(bad)}"
        mine = tuple(rank for rank in everybody if nodes[rank] == node)
        return _Slow(cause="node", ranks=mine, lost_s=lost_s, confidence=0.8, why=why, names=f"{node} links")
    first = bad[0]
    ends = tuple(rank for rank in everybody if nodes[rank] in first.nodes)
    sure = 0.9 if len(attempt.nodes) > 2 and grown else 0.7
    why = f"{share}, for the link between {links.told(bad)}"
    return _Slow(
        cause="link", ranks=ends, lost_s=lost_s, confidence=sure, why=why, names=" ".join(first.nodes)
    )


def _outstanding(paces: Paces, layout: Layout, of: Callable[[Pace], float]) -> Sequence[tuple[Rank, float]]:
    """Ranks that take clearly longer than their peers, and by how much."""
    out = []
    for rank, one in paces.items():
        lost_s = _beyond(paces, layout, rank, of)
        usual_s = of(one) - lost_s
        if lost_s > _LOSS_MIN_S and of(one) > _STANDS_OUT * usual_s:
            out.append((rank, lost_s))
    return out


def _beyond(paces: Paces, layout: Layout, rank: Rank, of: Callable[[Pace], float]) -> float:
    """By how much a rank takes longer than its peers' median; 0 without any."""
    peers = [each for each in layout.group("dp", rank) if each != rank]
    peers = peers or [each for each in layout.group("tp", rank) if each != rank]
    return of(paces[rank]) - statistics.median(of(paces[each]) for each in peers) if peers else 0.0


def _line(one: RankView) -> str:
    pace = one.pace
    if pace is None:
        return f"rank {one.rank}: not measured"
    figures = (
        ("computes", pace.own_s),
        ("data", pace.data_s),
        ("waits", pace.waited_s),
        ("without a processor", pace.starved_s),
        ("collects garbage", pace.collected_s),
    )
    return f"rank {one.rank}: " + ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in figures)
