"""How much memory a rank of the built-in trainer takes, from its job alone."""

from keepstep.core.footprint import Footprint, Training, fullest
from keepstep.core.job import LlamaRun
from keepstep.core.layout import Layout


def rank_memory(run: LlamaRun, layout: Layout, *, replicas: int, gpus: bool = True) -> Footprint:
    """Of the rank and stage that take most; `replicas` were asked for, the layout has as many or fewer."""
    numerics = run.numerics
    bf16 = numerics.precision == "bf16" or (numerics.precision == "auto" and gpus)
    found = []
    for batch in run.batch.all:
        training = Training(
            seq=batch.seq,
            micro_batch=batch.micro_batch,
            micro_batches=batch.micro_batches(replicas),
            replicas=replicas,
            schedule=run.pipeline.schedule,
            chunks=run.pipeline.chunks,
            recompute=numerics.recompute,
            shard=numerics.shard,
            element=2 if bf16 else 4,
            cuda=gpus,
        )
        found.append(fullest(run.model, layout, training)[1])
    return max(found, key=lambda one: one.total)
