"""What each node should run, from the book: a pure function of levels. Sending it twice changes nothing."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from keepstep.control.book import Entry, layout_of
from keepstep.control.fleet import Member
from keepstep.core.cadence import mtbf_s
from keepstep.core.ids import JobId, Node, Term
from keepstep.core.job import JobSpec
from keepstep.core.layout import local_ranks
from keepstep.core.states import AttemptState, JobState
from keepstep.decide.buddies import buddies
from keepstep.decide.death import fenced, orphan_lease_s
from keepstep.decide.decide import FINISH_S
from keepstep.decide.lying import skipped
from keepstep.decide.plan import Policy
from keepstep.spec import to_dict
from keepstep.store.rows import AttemptRow
from keepstep.wire import messages as wire

_LIVE = {AttemptState.PREPARING, AttemptState.STARTING, AttemptState.RUNNING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Carriers:
    """Of one job: where its carriers listen, and what they know each other by. No secret: there are none."""

    secret: str = ""
    addresses: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def desired(
    member: Member,
    entries: Mapping[JobId, Entry],
    term: Term,
    policy: Policy,
    carriers: Callable[[Entry], Carriers] = lambda _: Carriers(),
) -> wire.Desired:
    """The launches and stops of one node, and the attempts whose end it may forget."""
    assert member.register is not None
    launches, stops, warm, keep, forget = [], [], [], [], []
    for entry in entries.values():
        row = entry.present
        if row is None:
            ended = entry.ended()
            # Until the next attempt; whatever is wanted, what is in memory may still have to be stored.
            needed = entry.job.wanted == "run" or entry.job.state == JobState.RECOVERING
            if ended and member.name in {*ended.nodes, *ended.spares} and needed:
                warm.append(wire.Warm(job=entry.job.id, run=run_of(entry.spec)))
            if ended and member.name in ended.spares and needed:
                keep += _keep(entry, entry.attempts[-1], carriers(entry), over=True)
            continue
        if member.name in row.nodes:
            if row.state in _LIVE:
                launch = _launch(entry, row, row.nodes.index(member.name), policy, carriers(entry))
                launches.append(launch)
            else:
                stops.append(_stop(entry, row))
            continue
        if member.name in row.spares:
            warm.append(wire.Warm(job=entry.job.id, run=run_of(entry.spec)))
        if row.state in _LIVE and (member.name in row.spares or _restored_from(row, member.name)):
            keep += _keep(entry, row, carriers(entry))
    for job, attempt in sorted(member.attempts):
        known = entries.get(JobId(job))
        present = known.present if known else None
        if present is not None and present.number == attempt:
            continue
        heard = member.attempts[job, attempt]
        if (job, attempt) not in member.current:
            continue
        if heard.status.phase in {"dead", "refused"}:
            forget.append((job, attempt))
        else:
            stops.append(
                wire.Stop(job=job, attempt=attempt, reason="a newer decision has ended this attempt")
            )
    return wire.Desired(
        term=term,
        instance=member.register.instance,
        launches=tuple(launches),
        stops=tuple(stops),
        warm=tuple(warm),
        keep=tuple(keep),
        forget=tuple(forget),
    )


def run_of(spec: JobSpec) -> dict[str, Any]:
    """The spec's `run`, as agents get it: normalised, references to secrets unresolved."""
    run: dict[str, Any] = to_dict(spec)["run"]
    return run


def _launch(entry: Entry, row: AttemptRow, node_rank: int, policy: Policy, carriers: Carriers) -> wire.Launch:
    spec, layout = entry.spec, layout_of(row)
    checkpoint = asdict(spec.checkpoint)
    if spec.checkpoint.auto:
        checkpoint["mtbf_s"] = _mtbf_s(entry, row)
    if spec.checkpoint.dir is not None:
        checkpoint["dir"] = checkpoint_folder(spec, entry.job.id)
    return wire.Launch(
        job=entry.job.id,
        attempt=row.number,
        name=spec.name,
        project=spec.project,
        world_size=layout.world_size,
        nodes=tuple(row.nodes),
        node_rank=node_rank,
        ranks=tuple(local_ranks(layout.world_size, len(row.nodes), node_rank)),
        go=row.master is not None,
        master=(row.master["address"], row.master["port"]) if row.master else None,
        run=run_of(spec),
        layout={"dp": layout.dp, "pp": layout.pp, "cp": layout.cp, "tp": layout.tp},
        replicas=spec.parallelism.dp,
        checkpoint=checkpoint,
        restore=(row.restore["attempt"], row.restore["step"]) if row.restore else None,
        memory=_memory(row),
        secret=carriers.secret,
        carriers=dict(carriers.addresses),
        buddy=buddies(row.nodes, layout, _keepers(row, carriers)).get(row.nodes[node_rank], ""),
        lineage=_lineage(entry),
        skip_steps=skipped(entry.failures(0.0)),
        self_fence_s=None if fenced(spec) else spec.recovery.self_fence_s,
        orphan_lease_s=orphan_lease_s(spec, policy),
        attached=entry.job.attached_node is not None,
    )


def _mtbf_s(entry: Entry, row: AttemptRow) -> float:
    """By the attempts before this one: the same whenever it is asked."""
    past = [before for before in entry.attempts if before.number < row.number]
    ran_s = max(0.0, sum(before.ended_at - before.placed_at for before in past if before.ended_at))
    failures = sum(before.incident is not None for before in past)
    return mtbf_s(layout_of(row).world_size, failures, ran_s)


def _keep(entry: Entry, row: AttemptRow, carriers: Carriers, *, over: bool = False) -> list[wire.Keep]:
    """For a node without a rank of it; nothing for a job that keeps no snapshots."""
    if not carriers.secret:
        return []
    layout = layout_of(row)
    return [
        wire.Keep(
            job=entry.job.id,
            attempt=row.number,
            world_size=layout.world_size,
            layout={"dp": layout.dp, "pp": layout.pp, "cp": layout.cp, "tp": layout.tp},
            restore=(row.restore["attempt"], row.restore["step"]) if row.restore else None,
            memory=_memory(row),
            lineage=_lineage(entry),
            secret=carriers.secret,
            carriers=dict(carriers.addresses),
            over=over,
        )
    ]


def _keepers(row: AttemptRow, carriers: Carriers) -> list[Node]:
    """Spares whose carrier has said where it listens: a buddy that cannot be reached protects nothing."""
    return [node for node in row.spares if node in carriers.addresses]


def _restored_from(row: AttemptRow, node: Node) -> bool:
    """Whether an attempt that has not stepped may still need what this node holds."""
    memory = (row.restore or {}).get("memory")
    return row.state != AttemptState.RUNNING and any(
        node in nodes for nodes in (memory or {}).get("holders", ())
    )


def _lineage(entry: Entry) -> tuple[tuple[int, int, int], ...]:
    return tuple((link.attempt, link.parent, link.parent_step) for link in entry.lineage())


def keeps_snapshots(spec: JobSpec) -> bool:
    """The built-in trainer's unless it was told not to; a script's where its spec says how often."""
    every = spec.checkpoint.snapshot_every_steps
    return every != 0 if spec.run.kind == "llama" else bool(every)


def _memory(row: AttemptRow) -> wire.Memory | None:
    memory = (row.restore or {}).get("memory")
    if memory is None:
        return None
    return wire.Memory(layout=memory["layout"], holders=tuple(tuple(nodes) for nodes in memory["holders"]))


def _stop(entry: Entry, row: AttemptRow) -> wire.Stop:
    grace = entry.spec.run.stop.grace_s if entry.job.wanted != "run" else 0.0
    if entry.grace is not None and entry.grace[0] == row.number:
        grace = entry.grace[1]
    torn = entry.job.wanted == "run" and not fenced(entry.spec)
    return wire.Stop(
        job=entry.job.id,
        attempt=row.number,
        reason=row.reason,
        grace_s=grace,
        finish_s=FINISH_S if torn else 0.0,
    )


def checkpoint_folder(spec: JobSpec, job: JobId) -> str:
    """Every job has a folder of its own below the one that its spec names, so no two jobs share a chain."""
    assert spec.checkpoint.dir is not None
    return f"{spec.checkpoint.dir.rstrip('/')}/{job}"


def unfinished_nodes(entries: Iterable[Entry]) -> set[str]:
    """Nodes that an attempt which has not ended stands on."""
    return {node for entry in entries if entry.present for node in entry.present.nodes}
