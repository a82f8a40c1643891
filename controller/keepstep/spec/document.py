"""The document that people write: every field, its meaning, its bounds and its default.

The meaning of a field is the text beneath it: `spec explain`, the JSON Schema and the reference are made
from these models. Defaults are those of `core.job`, so that a spec that was never a document has the same.
"""

from typing import Annotated, Literal

from pydantic import Field

from keepstep.core import job
from keepstep.spec.fields import (
    AutoSeconds,
    Every,
    Name,
    Number,
    Seconds,
    SnapshotEvery,
    SomeText,
    Truth,
    Whole,
)
from keepstep.spec.run_document import RunSection
from keepstep.spec.scalars import Interval
from keepstep.spec.section import Section, Several

_RESOURCES, _RECOVERY, _RESTARTS, _BACKOFF = job.Resources(), job.Recovery(), job.Restarts(), job.Backoff()
_CHECKPOINT = job.Checkpoint(dir=None)
_DEGREE = Field(ge=1, le=2**20)


class ResourcesSection(Section):
    """What the job needs to run."""

    nodes: Annotated[Whole, Field(ge=1, le=2**20)] = _RESOURCES.nodes
    """Nodes of the gang."""
    gpus_per_node: Annotated[Whole, Field(ge=1, le=1024)] = _RESOURCES.gpus_per_node
    """GPUs of each node, one for each rank; slots on machines without GPUs."""
    spares: Annotated[Whole, Field(ge=0, le=2**20)] = _RESOURCES.spares
    """Nodes kept warm beside the gang, to take the place of lost ones; they keep copies of its snapshots."""
    labels: dict[SomeText, SomeText] = Field(default_factory=dict)
    """Labels that its nodes must have, such as the rack: value, !value, in(a,b) or !in(a,b)."""


class ParallelismSection(Section):
    """How ranks share the work; the product is nodes x gpus_per_node."""

    tp: Annotated[Whole, _DEGREE] = 1
    """Tensor parallel: ranks that share each matrix. Best within a node."""
    pp: Annotated[Whole, _DEGREE] = 1
    """Pipeline parallel: stages that share the layers."""
    dp: Annotated[Whole, _DEGREE] | None = Field(
        default=None, json_schema_extra={"default_text": "what tp, pp and cp leave"}
    )
    """Data parallel: replicas that share the batch."""
    cp: Annotated[Whole, _DEGREE] = 1
    """Context parallel: ranks that share each sequence, for long ones."""


class ElasticSection(Section):
    """How far the job may shrink when nodes are missing; it grows back by itself."""

    min_dp: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, json_schema_extra={"default_text": "parallelism.dp: the job does not shrink"}
    )
    """The fewest replicas it may run with; their number always divides parallelism.dp."""


class CheckpointSection(Section):
    """What is kept to restart from. What only memory has is stored in `dir` before its nodes are given up."""

    dir: SomeText | None = Field(
        default=None, json_schema_extra={"default_text": "./checkpoints for the built-in trainer, else none"}
    )
    """The folder, seen by every node: a path, from where the spec lies. Object stores have to be mounted."""
    every: Every = Interval()
    """Between checkpoints; auto: from their measured cost and the rate of failures."""
    keep: Annotated[Whole, Field(ge=1, le=10_000)] = _CHECKPOINT.keep
    """How many complete checkpoints are kept, the newest."""
    snapshot_every: SnapshotEvery = Field(default=_CHECKPOINT.snapshot_every_steps, validate_default=False)
    """Between snapshots in memory, where three fit into it. auto: each step, or as rarely as it takes for
    copying to cost a rank at most 5 % of its time, and a node at most half of the time to send copies to its
    buddy; for a script: never."""


class RestartsSection(Section):
    """The budget for failures blamed on the job; the infrastructure's do not count."""

    max: Annotated[Whole, Field(ge=0, le=10**6)] = _RESTARTS.max
    """Restarts within `per`; one more failure fails the job."""
    per: Annotated[Seconds, Field(gt=0)] = _RESTARTS.per_s
    """The window, always the latest."""


class BackoffSection(Section):
    """The pause before a restart when the attempts before made no step; the first restart has none."""

    first: Annotated[Seconds, Field(ge=0)] = _BACKOFF.first_s
    """After one attempt without a step."""
    factor: Annotated[Number, Field(ge=1, le=100)] = _BACKOFF.factor
    """From each pause to the next."""
    max: Annotated[Seconds, Field(ge=0)] = _BACKOFF.max_s
    """The longest pause."""


class RecoverySection(Section):
    """What counts as failed, and how often the job is brought back."""

    hang_after: AutoSeconds = Field(default=_RECOVERY.hang_after_s, validate_default=False)
    """Without progress for this long the gang is ended and restarted; auto: learnt from the job's phases."""
    hang_after_unknown: Annotated[Seconds, Field(gt=0)] = _RECOVERY.hang_after_unknown_s
    """The same in a phase that this job was not yet seen to complete: a first evaluation, say."""
    start_within: Annotated[Seconds, Field(gt=0)] = _RECOVERY.start_within_s
    """For all nodes to get ready; then other nodes are taken for those that are not."""
    restarts: RestartsSection = RestartsSection()
    """The budget for failures blamed on the job."""
    backoff: BackoffSection = BackoffSection()
    """The pause before restarts that lead nowhere."""
    no_progress_max: Annotated[Whole, Field(ge=1, le=10**6)] = _RECOVERY.no_progress_max
    """Attempts in a row without a single step, whoever is to blame; then the job fails."""
    on_loss_spike: Literal["tell", "skip"] = "tell"
    """A loss that stays far above its band is told, or the job goes back to before it; where it comes again
    from the same batches, they are left out. The built-in trainer only."""
    fenced: Truth | None = Field(
        default=None, json_schema_extra={"default_text": "true for the built-in trainer, else false"}
    )
    """Whether late writes of an attempt that was given up can do no harm. With true the next attempt starts
    at once; else only when every rank of the old one is known to be dead."""
    self_fence: Annotated[Seconds, Field(ge=1)] = _RECOVERY.self_fence_s
    """A node that had no controller and saw no step for this long ends its ranks."""
    orphan_lease: Annotated[Seconds, Field(ge=1)] = _RECOVERY.orphan_lease_s
    """How long a gang of which no node answers is left in peace before it is started elsewhere."""


class JobDocument(Section):
    """A job: what to run, on what, and how hard to keep it running."""

    name: Name | None = Field(default=None, json_schema_extra={"default_text": "the file's name"})
    """What people call the job; several jobs may have it."""
    project: Name = "default"
    """Whom its GPU-seconds are counted for."""
    queue: Name = "default"
    """Where it waits for its turn."""
    priority: Annotated[Whole, Field(ge=-1_000_000, le=1_000_000)] = 0
    """Higher runs first."""
    pool: Name = "local"
    """Where its nodes come from: local, or a pool named in the settings."""
    resources: ResourcesSection = ResourcesSection()
    """What the job needs to run."""
    parallelism: ParallelismSection = ParallelismSection()
    """How ranks share the work."""
    elastic: ElasticSection = ElasticSection()
    """How far the job may shrink."""
    run: RunSection
    """What runs in each rank: `llama: {...}`, `command: [...]` or `module: ...`."""
    checkpoint: CheckpointSection = CheckpointSection()
    """What is kept to restart from."""
    recovery: RecoverySection = RecoverySection()
    """What counts as failed, and how often the job is brought back."""
    notify: Several = ()
    """Whom to tell of incidents and of the end: apprise URLs."""
