"""Who runs where: whole nodes, all of a gang or nothing of it, and always an answer why not.

A node serves one job at a time. Nodes are taken in a stable order: first those the job ran on (at the same
node rank), then those that stand by or are warm for it, then by name. Silent and lost nodes are never
taken, nor those that are out of service (`core.states.life`), nor nodes on which something of an ended
attempt still lives; attached nodes serve their own job only. Spares are whole nodes, too, named in the
attempt and kept warm; a gang starts without them when there are none.

Jobs are served by priority, then by age. A later job may use what an earlier one cannot, until that one has
waited for `hold_after_s`; from then on nodes are held for it, so that no stream of small jobs starves it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from keepstep.core.ids import JobId, Node
from keepstep.core.job import JobSpec
from keepstep.core.layout import Layout
from keepstep.core.states import WORKING, LifeState, NodeState
from keepstep.decide.plan import Rejected
from keepstep.decide.view import RESERVED_FOR, AttemptView, JobView, NodeView

Holders = Mapping[Node, JobId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The nodes of a job's pool: those it may use now in the order it takes them, the others with why not."""

    free: tuple[NodeView, ...]
    refused: Mapping[Node, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    nodes: tuple[Node, ...]  # by node rank
    spares: tuple[Node, ...]
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Why a job waits: what it needs, what there is, what would fit."""

    reason: str
    rejected: tuple[Rejected, ...] = ()


def survey(
    job: JobView,
    nodes: Iterable[NodeView],
    held: Holders,
    first: Sequence[Node] = (),
    last: Set[Node] = frozenset(),
) -> Survey:
    """`first`: nodes to prefer, in their order; `last`: nodes to take only when there are no others."""
    free: list[NodeView] = []
    refused: dict[Node, str] = {}
    for node in nodes:
        if node.pool == job.spec.pool and not _foreign(job, node):
            why = unusable(job, node, held)
            if why:
                refused[node.name] = why
            else:
                free.append(node)
    order = {name: index for index, name in enumerate(job.spec.validates or first)}

    def preference(node: NodeView) -> tuple[object, ...]:
        kept = order.get(node.name, len(order))
        proving = node.life is not LifeState.HEALTHY
        return (node.name in last, kept, job.id not in node.warm_for, proving, natural(node.name))

    free.sort(key=preference)
    return Survey(free=tuple(free), refused=dict(sorted(refused.items(), key=lambda item: natural(item[0]))))


def unusable(job: JobView, node: NodeView, held: Holders = {}) -> str:  # noqa: B006 - a Mapping, never written
    """Why a job may not use a node at this moment, or nothing."""
    need = job.spec.resources.gpus_per_node
    if node.confirmed or node.state in (NodeState.LOST, NodeState.GONE):
        return "is gone" if node.state is NodeState.GONE else "is lost"
    if node.state is NodeState.SILENT:
        return "is silent"
    if not node.connected:
        return "is not connected"
    if node.leaving:
        return "is leaving"
    if node.life not in WORKING and node.name not in job.spec.validates:
        return f"is {node.life}"
    for label, selector in job.spec.resources.labels.items():
        if not matches(node.labels.get(label), selector):
            return f"has {label} {node.labels.get(label, 'not set')}, not {selector}"
    if node.slots < need:
        return f"has {node.slots} of {need} slots"
    if node.lingering:
        return f"still has processes of {', '.join(sorted(node.lingering))}"
    holder = held.get(node.name)
    if holder is not None and holder != job.id:
        return f"is {holder}'s"
    return ""


def matches(have: str | None, selector: str) -> bool:
    """Whether a node's label is as it must be: value, !value, in(a,b), !in(a,b)."""
    positive = not selector.startswith("!")
    body = selector.removeprefix("!")
    values = body[3:-1].split(",") if body.startswith("in(") and body.endswith(")") else [body]
    return (have in [value.strip() for value in values]) is positive


def layouts(spec: JobSpec) -> tuple[Layout, ...]:
    """What the job may run with, the largest first: numbers of replicas that divide its batch."""
    counts = spec.replica_counts
    if spec.run.kind == "llama":
        stages = spec.run.batch.all
        counts = tuple(dp for dp in counts if all(stage.sequences % dp == 0 for stage in stages))
    return tuple(spec.parallelism.with_replicas(dp) for dp in counts)


def place(job: JobView, there: Survey, layout: Layout) -> Placement | None:
    """All of the gang's nodes, or none; then as many spares as are left."""
    need = job.spec.nodes_for(layout.dp)
    if len(there.free) < need:
        return None
    names = [node.name for node in there.free]
    spares = tuple(names[need : need + job.spec.resources.spares])
    return Placement(nodes=tuple(names[:need]), spares=spares, layout=layout)


def stand_by(job: JobView, attempt: AttemptView, there: Survey) -> tuple[Node, ...]:
    """Who should stand by for an attempt: those that do, as long as they can be used, then others."""
    free = [node.name for node in there.free if node.name not in attempt.nodes]
    kept = [name for name in attempt.spares if name in free]
    more = [name for name in free if name not in kept]
    return (*kept, *more)[: job.spec.resources.spares]


def told(job: JobView, placement: Placement, nodes: Iterable[NodeView]) -> str:
    """A placement in words."""
    warm = sum(job.id in node.warm_for for node in nodes if node.name in placement.nodes)
    said = f"{placement.layout} on {count(len(placement.nodes), 'node')}: {listed(placement.nodes)}"
    if warm:
        said += f" ({warm} warm)"
    if job.spec.resources.spares:
        said += f"; {len(placement.spares)} of {count(job.spec.resources.spares, 'spare')} standing by"
        said += f": {listed(placement.spares)}" if placement.spares else ""
    return said


def missing(
    job: JobView, there: Survey, held: Holders, others: Mapping[JobId, JobView], smaller: bool
) -> Missing:
    """`smaller`: the job may start with fewer replicas (it has run before), and even those do not fit."""
    options = layouts(job.spec)
    need = job.spec.nodes_for(options[-1].dp if smaller else options[0].dp)
    slots = job.spec.resources.gpus_per_node
    each = f" with {count(slots, 'slot')} each" if need > 1 else f" with {count(slots, 'slot')}"
    parts = [f"needs {count(need, 'node')}{each}"]
    parts.append(
        f"{len(there.free)} free" + (f" ({listed([n.name for n in there.free])})" if there.free else "")
    )
    if there.refused:
        parts.append(listed([f"{name} {why}" for name, why in there.refused.items()], most=6))
    if job.lacks:
        parts.append(job.lacks)
    elif not there.free and not there.refused:
        parts.append(f"pool {job.spec.pool} has no node" + (" of its own" if job.attached else ""))
    fits = next((layout for layout in options if job.spec.nodes_for(layout.dp) <= len(there.free)), None)
    if fits is not None:
        nodes = count(job.spec.nodes_for(fits.dp), "node")
        parts.append(f"would fit: {fits} on {nodes}; it starts whole and may shrink later")
    lower = sorted(
        {
            holder
            for name, holder in held.items()
            if name in there.refused and holder in others and others[holder].spec.priority < job.spec.priority
        }
    )
    rejected = tuple(
        Rejected(
            option=f"preempt {holder}",
            why=f"its priority is {others[holder].spec.priority}, lower than {job.spec.priority}, "
            "but running jobs are not preempted yet",
        )
        for holder in lower
    )
    return Missing(reason="; ".join(parts), rejected=rejected)


def could_ever(job: JobView, nodes: Iterable[NodeView]) -> list[Node]:
    """Nodes that would do for a job once their present users have left them, if they are enough for it."""
    fit = [
        node.name
        for node in nodes
        if node.pool == job.spec.pool and not _foreign(job, node) and not unusable(job, node)
    ]
    smallest = layouts(job.spec)[-1 if job.attempts else 0]
    return fit if len(fit) >= job.spec.nodes_for(smallest.dp) else []


def _foreign(job: JobView, node: NodeView) -> bool:
    """Attached and reserved nodes serve their own job, attached jobs and validations have no others."""
    if job.spec.validates and node.name not in job.spec.validates:
        return True
    if node.labels.get(RESERVED_FOR, job.id) != job.id and not job.spec.validates:
        return True
    return node.attached != (job.id if job.attached is not None else None)


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts node-2 before node-10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str], most: int = 8) -> str:
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
