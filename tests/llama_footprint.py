"""The memory of a rank by part, from its job alone: what is allocated once, and what a step holds at most.

Not counted: the CUDA context, NCCL's buffers, libraries' workspaces, and what lives within one layer only.
"""

from dataclasses import dataclass, fields

from keepstep.llama.flat import FlatIndex, stage_layers
from keepstep.llama.job import TrainJob
from keepstep.llama.numerics import LOGITS, activation_bytes
from keepstep.llama.schedule import Pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes."""

    weights: int  # that are computed with
    gradients: int  # fp32, of the whole rank
    exchanged: int  # fp32: gradients on their way to their owners
    owned: int  # fp32 master weights and both moments of the owned range
    activations: int  # of all micro-batches that are under way at the same time
    logits: int  # of one chunk: fp32, and the gradient in the computing precision

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def footprint(job: TrainJob, rank: int, *, element: int = 2) -> Footprint:
    """`element`: bytes of the precision that is computed in."""
    layout, shape, chunks = job.layout, job.shape, job.pipeline.chunks
    at = layout.coordinates(rank)
    index = FlatIndex.of(shape, layout, at, replicas=job.replicas, chunks=chunks)
    segment, shared = len(index.segment), index.dp * index.cp == 1 and element == 4
    mine = index.replicas // index.dp
    apart = 0 if index.replicas == 1 else segment * mine + index.shard
    stages = layout.pp * chunks
    layers = [len(stage_layers(shape.layers, stages, chunk * layout.pp + at.pp)) for chunk in range(chunks)]
    tokens = job.micro_batch * job.seq // layout.cp
    layer = activation_bytes(
        shape, tokens, job.numerics.recompute, tp=layout.tp, cp=layout.cp, element=element
    )
    last = at.pp == layout.pp - 1
    columns = shape.vocabulary // layout.tp
    rows = min(tokens, max(1, LOGITS // columns))
    return Footprint(
        weights=0 if shared else index.length * element,
        gradients=index.length * 4,
        exchanged=4 * (apart + (segment if index.cp > 1 else 0)),
        owned=3 * index.shard * 4,
        activations=round(
            layer * most_held(job.pipeline.passes(layout.pp, at.pp, job.micro_batches), layers)
        ),
        logits=rows * columns * (4 + element) if last else 0,
    )


def most_held(order: list[Pass], layers: list[int]) -> int:
    """Layers whose activations are held at the same time, over the micro-batches; `layers` of each chunk."""
    held = most = 0
    for one in order:
        held += -layers[one.chunk] if one.backward else layers[one.chunk]
        most = max(most, held)
    return most
