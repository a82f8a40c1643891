"""What the API says of a job: rows of the store joined with what the fleet reports at this moment."""

from dataclasses import asdict
from typing import Any

from keepstep.control.book import Entry, layout_of
from keepstep.control.desired import checkpoint_folder
from keepstep.control.loop import Controller
from keepstep.control.picture import draw, kept
from keepstep.core.ids import JobId
from keepstep.core.job import JobSpec, LlamaRun
from keepstep.core.layout import Layout
from keepstep.core.states import JobState
from keepstep.decide.decide import decide
from keepstep.decide.plan import Place
from keepstep.decide.restore import memory_point, protected_step
from keepstep.decide.view import JobView, View
from keepstep.spec import from_dict
from keepstep.spec.memory import rank_memory
from keepstep.store.rows import AttemptRow, Job
from keepstep.wire import messages as wire


async def describe_job(control: Controller, job: Job, *, whole: bool = False) -> dict[str, Any]:
    """The stable shape of a job in every answer; `whole` adds what is only looked at one job at a time."""
    spec = from_dict(job.spec)
    rows = await control.on_store(control.store.attempts, job.id)
    row = rows[-1] if rows else None
    newest = await control.on_store(control.store.newest_step, job.id)
    last = (
        (await control.on_store(control.store.points, job.id, after_step=newest - 1)).items
        if newest >= 0
        else ()
    )
    layout = layout_of(row) if row else spec.parallelism
    entry = control.book.entries.get(job.id)
    seen = max(newest, entry.progress.step) if entry else newest  # plain scripts tell no figures
    steps = spec.run.steps if isinstance(spec.run, LlamaRun) else None
    failures = entry.failures(control.clock.wall()) if entry else ()
    window = spec.recovery.restarts.per_s
    used = sum(f.blame == "job" and f.age_s <= window for f in failures)
    point = last[-1] if last else None
    told: dict[str, Any] = {
        "id": job.id,
        "number": job.number,
        "name": job.name,
        "project": job.project,
        "principal": job.principal,
        "state": job.state,
        "wanted": job.wanted,
        "reason": job.reason,
        "due_s": entry.due_s(control.time) if entry and entry.due and entry.due[0] == job.reason else None,
        "pool": job.pool,
        "queue": job.queue,
        "priority": job.priority,
        "layout": {"dp": layout.dp, "pp": layout.pp, "cp": layout.cp, "tp": layout.tp},
        "world_size": layout.world_size,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "exit_code": job.exit_code,
        "attached": job.attached_node,
        "attempt": attempt_of(row) if row else None,
        "progress": {
            "step": seen if seen >= 0 else None,
            "steps": steps,
            "loss": point.loss if point else None,
            "grad_norm": point.grad_norm if point else None,
            "tokens_per_s": point.tokens_per_s if point else None,
            "tflops": point.tflops if point else None,
            "mfu": point.mfu if point else None,
            "validation": await _validation(control, job.id),
            "checkpoint_step": entry.progress.checkpoint_step if entry else None,
            "age_s": control.time.age(entry.progress.moved_at) if entry else None,
            "time": entry.progress.shares() if entry else {},
        },
        "rank_memory": _rank_memory(control, spec, layout, row),
        "restarts": {"used": used, "max": spec.recovery.restarts.max},
        "waiting_for": job.reason if job.state == JobState.QUEUED else None,
    }
    if whole:
        incidents = await control.on_store(control.store.incidents, job=job.id, limit=1000)
        told["memory"] = _memory(control, entry) if entry else None
        told["incidents"] = [i.id for i in incidents.items]
        told["spec"] = job.spec
        told["source"] = job.source
        told["checkpoint_dir"] = checkpoint_folder(spec, job.id) if spec.checkpoint.dir else None
    return told


def _rank_memory(
    control: Controller, spec: JobSpec, layout: Layout, row: AttemptRow | None
) -> dict[str, int] | None:
    """Bytes by part of the built-in trainer's fullest rank; on GPUs until its nodes are known."""
    if not isinstance(spec.run, LlamaRun):
        return None
    members = (control.fleet.members.get(name) for name in (row.nodes if row else ()))
    nodes = [member.register for member in members if member is not None and member.register is not None]
    gpus = not nodes or any(node.gpus for node in nodes)
    found = rank_memory(spec.run, layout, replicas=spec.parallelism.dp, gpus=gpus)
    return {**asdict(found), "total": found.total}


async def _validation(control: Controller, job: JobId) -> dict[str, Any] | None:
    """The newest evaluation."""
    found = await control.on_store(control.store.evaluations, job, limit=100)
    if not found:
        return None
    newest = [one for one in found if (one.attempt, one.step) == (found[0].attempt, found[0].step)]
    losses = {one.source: one.loss for one in newest}
    return {"step": newest[0].step, "loss": losses.pop("", None), "by_source": losses}


def _memory(control: Controller, entry: Entry) -> dict[str, Any] | None:
    """What is in memory of a job: as listed within the last second."""
    held = kept(entry.job.id, control.fleet)
    if not held:
        return None
    shape, lineage = entry.spec.parallelism, entry.lineage()
    whole = memory_point(lineage, held, shape).at
    return {
        "step": whole.step if whole else None,
        "protected_step": protected_step(lineage, held, shape),
        "bytes": sum(
            status.memory_bytes
            for member in control.fleet.members.values()
            for status in member.snapshots
            if status.job == entry.job.id
        ),
    }


def attempt_of(row: AttemptRow) -> dict[str, Any]:
    parent = None
    if row.parent_attempt is not None:
        parent = {"attempt": row.parent_attempt, "step": row.parent_step}
    return {
        "number": row.number,
        "state": row.state,
        "rung": row.rung,
        "reason": row.reason,
        "outcome": row.outcome,
        "nodes": list(row.nodes),
        "spares": list(row.spares),
        "layout": row.layout,
        "parent": parent,
        "restore": row.restore,
        "placed_at": row.placed_at,
        "first_step_at": row.first_step_at,
        "ended_at": row.ended_at,
        "incident": row.incident,
        "term": row.term,
    }


async def ranks_of(control: Controller, job: Job) -> list[dict[str, Any]]:
    """Every rank of the present attempt, with its role, as its node last reported it."""
    if job.attempt == 0:
        return []
    row = await control.on_store(control.store.attempt, job.id, job.attempt)
    layout = layout_of(row)
    told = [
        _rank(rank, layout, heard.status, control.time.age(heard.at))
        | {"node": member.name, "current": current}
        for member, heard, current in control.fleet.parts(job.id, job.attempt)
        for rank in heard.status.ranks
    ]
    return sorted(told, key=lambda rank: int(rank["rank"]))


def _rank(
    rank: wire.RankStatus, layout: Layout, status: wire.AttemptStatus, since_s: float
) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "role": str(layout.coordinates(rank.rank)),
        "local_rank": rank.local_rank,
        "pid": rank.pid,
        "state": rank.state,
        "process": rank.process,
        "exit_code": rank.exit_code,
        "signal": rank.signal,
        "step": rank.step,
        "phase": rank.phase,
        "phase_age_s": None if rank.phase_age_s is None else rank.phase_age_s + since_s,
        "micro_batch": rank.micro_batch,
        "error": rank.error,
        "last_lines": rank.last_lines,
        "warm": status.warm,
        "cold_reason": status.cold_reason,
    }


def preview(control: Controller, spec: JobSpec) -> dict[str, Any]:
    """What would be decided for this job now, if it were the only one in the queue."""
    view = draw(
        control.book, control.fleet, wall=control.clock.wall(), up_s=control.policy.return_within_s + 1
    )
    job = JobView(id=JobId(f"{spec.name}-preview"), spec=spec, state=JobState.QUEUED)
    plan = decide(View(jobs=(*view.jobs, job), nodes=view.nodes, up_s=view.up_s), control.policy)
    for change in plan.changes:
        if change.job == job.id:
            told: dict[str, Any] = {"placed": isinstance(change, Place), "reason": change.reason}
            if isinstance(change, Place):
                told |= {
                    "nodes": list(change.nodes),
                    "spares": list(change.spares),
                    "layout": asdict(change.layout),
                }
            return told | {"rejected": [asdict(option) for option in change.rejected]}
    return {"placed": False, "reason": "nothing would be decided for it now", "rejected": []}
