"""The memory of a rank of the built-in trainer by part, from what its job says: arithmetic alone.

Weights, gradients, exchange and state are buffers that live as long as the rank: these figures are exact.
Activations are those that a layer holds for its backward pass, in elements a token, for dim d, KV width k,
FFN width f:

    none       4 d/tp + 2 d + 2 k/tp + 3 f/tp    everything
    selective  4 d/tp       + 2 k/tp + 2 f/tp    outputs of norms and SwiGLU are made again, no matrices
    full         d/tp                            the layer's input; the whole layer is run again

(d/tp each: inputs of both norms, queries, attention's output; d: the gathered inputs of the column matrices;
with context parallelism keys and values are those of all its ranks. Beside that a few fp32 numbers a token:
norms' scales, attention's sums.) A micro-batch under way holds the stage's result, too.

Beside them stands the largest of what comes and goes: of a layer's backward pass, of the logits. Not counted:
the device's context, NCCL's buffers, libraries' workspaces; on CPU, copies that gloo needs, and the masks of
context parallel ranks.
"""

import itertools
from dataclasses import dataclass, fields
from typing import Protocol

from keepstep.core.layout import Layout, stage_layers

ALIGNMENT = 64  # elements: owned ranges start at whole cache lines, whatever the data type
LOGITS = 2**27  # that exist at a time: 512 MB in fp32


class Shape(Protocol):
    """Of a Llama 3 model, as specs and the trainer have it."""

    @property
    def layers(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def ffn_dim(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What decides the memory of a rank beside model and layout."""

    seq: int
    micro_batch: int  # sequences
    micro_batches: int  # of a replica in a step
    replicas: int  # that the job asked for; the layout has as many, or fewer
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: str = "none"
    shard: str = "optimizer"
    element: int = 2  # bytes of the precision that is computed in
    cuda: bool = True  # NCCL adds while it reduces, and weights are fetched ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes."""

    weights: int  # that are computed with
    gradients: int  # fp32, before they are added to others'
    exchanged: int  # fp32: their sums of the owned ranges, and what of others' is not added yet
    owned: int  # fp32 master weights and both moments of the owned ranges
    activations: int  # of all micro-batches that are under way at the same time
    edges: int  # activations and gradients on their way between stages
    working: int  # gradients of activations within one layer, and what it makes again
    logits: int  # of one chunk, their exponentials and gradients

    @property
    def total(self) -> int:
        """At most: a layer's backward pass and the logits are not there at the same time."""
        every: int = sum(getattr(self, field.name) for field in fields(self))
        return every - min(self.working, self.logits)

    def __str__(self) -> str:
        """61.3 GB: weights 6.1, ..."""
        parts = {field.name: getattr(self, field.name) / 1e9 for field in fields(self)}
        told = ", ".join(f"{name} {size:.3g}" for name, size in parts.items() if size)
        return f"{self.total / 1e9:.3g} GB: {told}"


def footprint(shape: Shape, layout: Layout, rank: int, of: Training) -> Footprint:
    """Of one rank of the layout."""
    at = layout.coordinates(rank)
    ranks, stages = layout.dp * layout.cp, layout.pp * of.chunks
    mine = of.replicas // layout.dp
    sharded = of.shard != "optimizer"
    units = _units(shape, layout, at.pp, of, sharded=sharded)
    length, largest = sum(units), max(units)
    shared = ranks == 1 and of.element == 4
    windows = 1 + of.cuda if of.shard == "parameters" else 0
    alone = of.replicas == 1 and not sharded
    exchanged = 0 if alone else length // ranks
    exchanged += largest // layout.cp * ((layout.dp > 1 and not of.cuda) + (layout.cp > 1))
    tokens = of.micro_batch * of.seq // layout.cp
    layer = activation_bytes(shape, tokens, of.recompute, tp=layout.tp, cp=layout.cp, element=of.element)
    result = tokens * shape.dim // layout.tp * of.element
    layers = [len(stage_layers(shape.layers, stages, c * layout.pp + at.pp)) for c in range(of.chunks)]
    passes = _held(of, layout.pp, at.pp, of.micro_batches * (mine if sharded else 1))
    columns = shape.vocabulary // layout.tp
    rows = min(tokens, max(1, LOGITS // columns)) if at.pp == layout.pp - 1 else 0
    return Footprint(
        weights=0 if shared else (windows * largest or length) * of.element,
        gradients=4 * (largest if sharded else length),
        exchanged=4 * exchanged,
        owned=3 * 4 * length // ranks,
        activations=round(sum(layer * layers[chunk] + result for chunk in passes)),
        edges=(2 * layout.pp + 2) * result if layout.pp > 1 else 0,  # sent: see pipeline.Runner; to come: 2
        working=round(_working(shape, tokens, of, layout, first=at.pp == 0)),
        logits=_logits(rows, columns, shape.dim, of.element),
    )


def fullest(shape: Shape, layout: Layout, of: Training) -> tuple[int, Footprint]:
    """The rank of the first replica that holds most, and what it holds; ranks of one stage are alike."""
    found = [
        (rank, footprint(shape, layout, rank, of))
        for rank in (int(layout.rank(pp=pp)) for pp in range(layout.pp))
    ]
    return max(found, key=lambda one: one[1].total)


def activation_bytes(
    shape: Shape, tokens: int, recompute: str, *, tp: int = 1, cp: int = 1, element: int = 2
) -> float:
    """That one layer holds for one micro-batch of `tokens` tokens on this context parallel rank."""
    dim, kv, ffn = shape.dim, shape.kv_heads * shape.dim // shape.heads * cp, shape.ffn_dim
    if recompute == "full":
        return tokens * dim / tp * element
    matrices = (4 * dim + 2 * kv + 2 * ffn) / tp
    again = 2 * dim + ffn / tp
    scales = 4 * (2 + shape.heads) / tp
    return tokens * ((matrices + (again if recompute == "none" else 0.0)) * element + scales)


def _working(shape: Shape, tokens: int, of: Training, layout: Layout, *, first: bool) -> float:
    """SwiGLU's backward pass has five of its width, or a matrix's gradient is larger; then the table's is."""
    dim, ffn = shape.dim, shape.ffn_dim / layout.tp
    again = ffn if of.recompute == "selective" else 0.0
    within = max(tokens * (5 * ffn + again), 2 * ffn * (tokens + dim)) + tokens * dim
    layer = 0.0
    if of.recompute == "full":
        layer = activation_bytes(shape, tokens, "none", tp=layout.tp, cp=layout.cp, element=of.element)
    table = shape.vocabulary * dim / layout.tp if first else 0.0
    return max(within * of.element + layer, table * of.element)


def _logits(rows: int, columns: int, dim: int, element: int) -> int:
    """In the loss two of fp32 beside themselves; then their gradient and that of the matrix."""
    if not rows:
        return 0
    in_loss = rows * columns * (8 if element == 4 else 8 + element)
    return max(in_loss, (2 * rows * columns + columns * dim) * element)


def _units(shape: Shape, layout: Layout, pp: int, of: Training, *, sharded: bool) -> list[int]:
    """Elements of each unit of a rank's flat vector, padding included."""
    dim, kv = shape.dim, shape.kv_heads * shape.dim // shape.heads
    layer = (2 * dim * dim + 2 * kv * dim + 3 * dim * shape.ffn_dim) // layout.tp + 2 * dim
    table, stages = shape.vocabulary * dim // layout.tp, layout.pp * of.chunks
    units: list[int] = []
    for stage in range(pp, stages, layout.pp):
        units += [table] if stage == 0 else []
        units += [layer] * len(stage_layers(shape.layers, stages, stage))
        units += [dim + table] if stage == stages - 1 else []
    multiple = layout.cp * of.replicas * ALIGNMENT
    return [-(-size // multiple) * multiple for size in (units if sharded else [sum(units)])]


def _held(of: Training, pp: int, rank: int, micro_batches: int) -> list[int]:
    """The chunks of the passes that are under way at the same time, at most."""
    match of.schedule:
        case "gpipe":
            return [*range(of.chunks)] * micro_batches
        case "1f1b":
            return [0] * min(micro_batches, pp - rank)
        case _:
            rounds = max(1, micro_batches // pp)
            edges = [micro_batches * k // rounds for k in range(rounds + 1)]
            sizes = [stop - start for start, stop in itertools.pairwise(edges)]
            order = [chunk for size in sizes for chunk in range(of.chunks) for _ in range(size)]
            return order[: 2 * (pp - rank - 1) + (of.chunks - 1) * max(sizes) + 1]
