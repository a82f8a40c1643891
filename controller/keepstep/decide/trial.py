"""The jobs that validate nodes: which workloads, on whom, in what shape."""

import hashlib
import json
import re
from collections.abc import Sequence

from keepstep.core.ids import Node
from keepstep.core.job import (
    Checkpoint,
    CommandRun,
    Elastic,
    JobSpec,
    LlamaRun,
    Recovery,
    Resources,
    Restarts,
)
from keepstep.core.layout import Layout

DEADLINE_S = 60.0  # of a workload
_DEADLINE_OF_A_JOB_S = 300.0  # in the shape of a job, whatever that is
_LAYERS_MAX = 2  # one layer multiplies what every other one does
_SEQ_MAX = 2048
_NAME_MAX = 24  # of a node's in a job's
_PRIORITY = 1000  # a node that proves itself waits for nobody's job


def named(kind: str, nodes: Sequence[Node], occasion: str) -> str:
    """A job's name that is always the same for this, whatever nodes are called."""
    digest = hashlib.blake2b(" ".join((*nodes, occasion)).encode(), digest_size=4).hexdigest()
    first = re.sub(r"[^a-z0-9]+", "-", nodes[0].lower())[:_NAME_MAX].strip("-")
    return "-".join(part for part in (kind, first, digest) if part)


def trial(
    name: str, nodes: Sequence[Node], *, slots: int, pool: str, of: JobSpec | None = None, pair: bool = False
) -> JobSpec:
    """Workloads on all slots of just these nodes. `of`: the job that failed; `pair`: only what two share."""
    ranks = len(nodes) * slots
    command = ["python", "-m", "keepstep.validate"]
    if pair:
        command.append("--pair")
    command += _shaped(of, slots)
    return JobSpec(
        name=name,
        priority=_PRIORITY,
        pool=pool,
        resources=Resources(nodes=len(nodes), gpus_per_node=slots),
        parallelism=Layout(dp=ranks),
        elastic=Elastic(min_dp=ranks),
        run=CommandRun(command=tuple(command), workdir="/", ship="none"),
        checkpoint=Checkpoint(dir=None, snapshot_every_steps=0),
        recovery=Recovery(restarts=Restarts(max=0), no_progress_max=1, fenced=True),
        validates=tuple(nodes),
    )


def _shaped(of: JobSpec | None, slots: int) -> list[str]:
    """A rank's part of the job's model: as wide, cut as thin, but not as deep."""
    if of is None or not isinstance(of.run, LlamaRun):
        return ["--deadline", f"{DEADLINE_S:g}"]
    run, layout = of.run, of.parallelism
    model = {
        "layers": min(_LAYERS_MAX, -(-run.model.layers // layout.pp)), "dim": run.model.dim,
        "ffn_dim": run.model.ffn_dim, "heads": run.model.heads, "kv_heads": run.model.kv_heads,
        "vocabulary": run.model.vocabulary, "max_seq": run.model.max_seq,
        "rope_theta": run.model.rope_theta, "norm_eps": run.model.norm_eps,
    }  # fmt: skip
    tp = layout.tp if slots % layout.tp == 0 else 1
    return [
        "--deadline", f"{_DEADLINE_OF_A_JOB_S:g}", "--model", json.dumps(model), "--tp", str(tp),
        "--seq", str(min(run.batch.seq, _SEQ_MAX)),
    ]  # fmt: skip
