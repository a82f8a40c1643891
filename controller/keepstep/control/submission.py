"""A job as it enters the store, whoever submits it."""

from typing import Any

from keepstep.core.ids import Node
from keepstep.core.job import JobSpec
from keepstep.core.states import JobState
from keepstep.spec import to_dict
from keepstep.store import Writer
from keepstep.store.rows import Job, NewEvent


def enter(
    writer: Writer, spec: JobSpec, *, who: str, project: str, source: Any = None, attached: Node | None = None
) -> Job:
    job = writer.add_job(
        name=spec.name,
        spec=to_dict(spec),
        pool=spec.pool,
        queue=spec.queue,
        priority=spec.priority,
        project=project,
        principal=who,
        source=source or {},
        attached_node=attached,
        state=JobState.QUEUED,
        reason="just submitted",
    )
    layout = spec.parallelism
    text = f"submitted by {who}: {layout}, {layout.world_size} ranks"
    writer.add_event(NewEvent(kind="submitted", text=text, job=job.id, principal=who))
    return job
