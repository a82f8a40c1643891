"""What each way back costs, in seconds of the gang, from what this job's own attempts took.

    start      from the decision to the first new step: where every node has the job loaded, as its restarts
               in place took; where one has not, as its first start did. What was not measured is assumed
    slowdown   a gang with fewer replicas than asked for loses their share until nodes come back
    requeue    a cold start, once the queue has served it; where nodes are lacking, once they are back

What all ways have in common (finding out, stopping, steps that are done again) is left out: it decides
nothing. Times the slots that the job asked for that is the number of slot-seconds lost.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from keepstep.core.ids import Node
from keepstep.decide.place import Placement, count, listed
from keepstep.decide.plan import Policy, Rejected
from keepstep.decide.view import Ended, JobView, NodeView

REQUEUE = "requeue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A rung that could be taken; `placement` None: known only by its price."""

    name: str
    seconds: float
    why: str
    placement: Placement | None = None


def options(
    job: JobView,
    ended: Ended,
    fitting: Iterable[tuple[str, Placement]],
    free: Iterable[NodeView],
    policy: Policy,
) -> list[Option]:
    """Each placement that fits, a swap of one node where there is a spare, and to requeue; cheapest first."""
    nodes = {node.name: node for node in free}
    found = [
        Option(
            name=name,
            seconds=_start_s(job, placement.nodes, nodes, policy) + _slowdown_s(job, placement, policy),
            why=_why(job, ended, name, placement, nodes, policy),
            placement=placement,
        )
        for name, placement in fitting
    ]
    stay = next((option for option in found if option.name == "in place"), None)
    if stay is not None and stay.placement is not None:
        found += _swap(job, ended, stay.placement, nodes, policy)
    whole = any(one.placement and one.placement.layout.dp >= job.spec.parallelism.dp for one in found)
    queued_s = cold_start_s(job, policy) + (policy.queue_s if whole else policy.nodes_back_s)
    found.append(Option(name=REQUEUE, seconds=queued_s, why="nodes that are ready would be given up"))
    return sorted(found, key=lambda option: option.seconds)  # stable: the ladder's order where prices agree


def rejected(taken: Option, others: Iterable[Option], slots: int) -> tuple[Rejected, ...]:
    """The others, each with what it would have cost beyond the one that is taken."""
    return tuple(
        Rejected(
            option=one.name,
            why=f"+{one.seconds - taken.seconds:.1f} s: {one.why}",
            lost_slot_s=round(one.seconds * slots, 3),
        )
        for one in others
        if one is not taken
    )


def warm_start_s(job: JobView, policy: Policy) -> float:
    return job.measured.starts.get("in place", policy.start_warm_s)


def cold_start_s(job: JobView, policy: Policy) -> float:
    return max(job.measured.starts.get("first", policy.start_cold_s), warm_start_s(job, policy))


def _start_s(job: JobView, names: Iterable[Node], nodes: dict[Node, NodeView], policy: Policy) -> float:
    cold = _cold(job, names, nodes)
    return cold_start_s(job, policy) if cold else warm_start_s(job, policy)


def _cold(job: JobView, names: Iterable[Node], nodes: dict[Node, NodeView]) -> list[Node]:
    return [name for name in names if name not in nodes or job.id not in nodes[name].warm_for]


def _slowdown_s(job: JobView, placement: Placement, policy: Policy) -> float:
    missing = 1.0 - placement.layout.dp / job.spec.parallelism.dp
    return max(missing, 0.0) * policy.nodes_back_s


def _swap(
    job: JobView, ended: Ended, stay: Placement, nodes: dict[Node, NodeView], policy: Policy
) -> list[Option]:
    """Where all nodes are well, one of them could still be swapped for a spare."""
    others = [name for name in nodes if name not in ended.nodes]
    if not others:
        return []
    warm = [name for name in others if name not in _cold(job, others, nodes)]
    spare = (warm or others)[0]
    seconds = _start_s(job, (*ended.nodes[1:], spare), nodes, policy) + policy.swap_s
    seconds += _slowdown_s(job, stay, policy)
    how = "loaded" if warm else "not loaded"
    return [Option(name="spare", seconds=seconds, why=f"{spare} is {how}, and no node needs to be replaced")]


def _why(
    job: JobView, ended: Ended, name: str, placement: Placement, nodes: dict[Node, NodeView], policy: Policy
) -> str:
    cold = _cold(job, placement.nodes, nodes)
    start = f"{listed(cold)} would start cold" if cold else "all nodes are loaded"
    asked = job.spec.parallelism.dp
    if placement.layout.dp < asked:
        share = f"{placement.layout.dp} of {count(asked, 'replica')}"
        return f"{share} until nodes are back, {policy.nodes_back_s:g} s assumed; {start}"
    return start
