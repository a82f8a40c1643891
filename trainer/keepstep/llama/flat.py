"""Flat buffers: all parameters of one (pipeline rank, tensor shard) end to end in one vector.

    flat index   0 ............ matrices ...... used .. length
                 | 2-D weights  | norm weights | padding |
    owned by     | cp 0            | cp 1                |     equal consecutive ranges, and of each of them
                 | dp 0   | dp 1   | dp 0   | dp 1       |     equal ranges again

Matrices come first: they are cut over the tensor parallel ranks and decay; norm weights come last: every
tensor parallel rank has them whole and they do not decay. So either kind is one slice.

`weights` and `grads` are the whole vector on every rank; `state` holds fp32 master weights and both moments
of the range this rank owns, in one contiguous piece: a snapshot is one copy. The length does not depend on
the present number of replicas, only on the number the job asked for (`replicas`), so that a job that shrinks
cuts the same vector into fewer, longer pieces.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from keepstep.core.errors import InputError
from keepstep.core.layout import Coordinates, Layout
from keepstep.llama.shape import ModelShape

ALIGNMENT = 64  # elements: owned ranges start at whole cache lines, whatever the data type


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatParameter:
    """Where one parameter's local part lies."""

    name: str  # canonical: see shape.py
    shape: tuple[int, ...]  # local, after the cut over tensor parallel ranks
    global_shape: tuple[int, ...]
    tp_dim: int | None  # the dimension that is cut; None: every tensor parallel rank has it whole
    tp_offset: int  # where the local part starts along tp_dim
    offset: int  # in the flat index

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def span(self) -> range:
        return range(self.offset, self.offset + self.numel)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatIndex:
    """The table of one (pipeline rank with all its chunks, tensor shard), the same on all its replicas."""

    parameters: tuple[FlatParameter, ...]
    matrices: int  # where norm weights start
    used: int  # where padding starts
    length: int
    replicas: int  # that the job asked for; the present dp divides it
    dp: int
    cp: int
    cp_rank: int

    @classmethod
    def of(
        cls, shape: ModelShape, layout: Layout, at: Coordinates, *, replicas: int = 0, chunks: int = 1
    ) -> "FlatIndex":
        replicas = replicas or layout.dp
        check_layout(shape, layout, replicas, chunks)
        stages = layout.pp * chunks
        sizes = [s for stage in range(at.pp, stages, layout.pp) for s in stage_sizes(shape, stages, stage)]
        ordered = [s for s in sizes if len(s[1]) > 1] + [s for s in sizes if len(s[1]) == 1]
        parameters, offset, matrices = [], 0, 0
        for name, size in ordered:
            dim = tp_dim(name)
            local, start = list(size), 0
            if dim is not None:
                local[dim] //= layout.tp
                start = at.tp * local[dim]
            placed = FlatParameter(
                name=name, shape=tuple(local), global_shape=size, tp_dim=dim, tp_offset=start, offset=offset
            )
            parameters.append(placed)
            offset += placed.numel
            matrices = offset if dim is not None else matrices
        unit = layout.cp * replicas * ALIGNMENT
        return cls(
            parameters=tuple(parameters), matrices=matrices, used=offset, length=-(-offset // unit) * unit,
            replicas=replicas, dp=layout.dp, cp=layout.cp, cp_rank=at.cp,
        )  # fmt: skip

    @property
    def shard(self) -> int:
        """Elements that each rank owns."""
        return self.length // (self.cp * self.dp)

    @property
    def segment(self) -> range:
        """What the replicas of this context parallel rank share: the same however many there are."""
        size = self.length // self.cp
        return range(self.cp_rank * size, (self.cp_rank + 1) * size)

    def owned(self, dp_rank: int) -> range:
        start = self.segment.start + dp_rank * self.shard
        return range(start, start + self.shard)

    def __getitem__(self, name: str) -> FlatParameter:
        return next(p for p in self.parameters if p.name == name)


class FlatState:
    """The buffers of one rank. `step` counts completed updates."""

    def __init__(self, index: FlatIndex, dp_rank: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.index, self.dp_rank, self.step = index, dp_rank, 0
        shard = index.shard
        self.state = torch.zeros(3 * shard, device=device)
        self.master, self.exp_avg, self.exp_avg_sq = torch.split(self.state, shard)
        # Who owns everything in fp32 computes with the master weights themselves: nothing to copy.
        self.shared = index.dp * index.cp == 1 and dtype == torch.float32
        self.weights = self.master if self.shared else torch.zeros(index.length, device=device, dtype=dtype)
        self.grads = torch.zeros(index.length, device=device)  # fp32: sums of many micro-batches

    def weight(self, *names: str) -> Tensor:
        return self._view(self.weights, names)

    def grad(self, *names: str) -> Tensor:
        return self._view(self.grads, names)

    def _view(self, buffer: Tensor, names: Iterable[str]) -> Tensor:
        """One parameter's view, or that of neighbours stacked along their first dimension."""
        first, *others = (self.index[name] for name in names)
        stop, rows = first.span.stop, first.shape[0]
        for other in others:
            assert other.offset == stop and other.shape[1:] == first.shape[1:], other.name
            stop, rows = other.span.stop, rows + other.shape[0]
        return buffer[first.offset : stop].view(rows, *first.shape[1:])


def stage_layers(layers: int, stages: int, stage: int) -> range:
    """The layers of a (virtual) stage: equally many where that can be.

    Else embedding and output count as a layer each, as in the paper (section 3.3.2): 126 layers on 16 stages
    are 7, 8 ... 8, 7. What is over goes to the later stages.
    """
    if layers % stages == 0:
        return range(layers // stages * stage, layers // stages * (stage + 1))
    first, stop = ((layers + 2) * k // stages - 1 for k in (stage, stage + 1))
    return range(max(0, first), min(layers, stop))


def stage_sizes(shape: ModelShape, stages: int, stage: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and global shapes of the parameters of a stage, in the order of the forward pass."""
    mine = {f"layers.{layer}" for layer in stage_layers(shape.layers, stages, stage)}
    if stage == 0:
        mine.add("embedding")
    if stage == stages - 1:
        mine |= {"norm", "output"}
    return [(name, size) for name, size in shape.sizes() if _block(name) in mine]


def tp_dim(name: str) -> int | None:
    """The dimension along which a parameter is cut over tensor parallel ranks."""
    match name.split(".")[-2]:
        case "wo" | "w2":
            return 1  # row parallel: the inputs are cut
        case "attention_norm" | "ffn_norm" | "norm":
            return None
        case _:
            return 0  # column parallel; embedding and output are cut along the vocabulary


def check_layout(shape: ModelShape, layout: Layout, replicas: int, chunks: int = 1) -> None:
    """InputError if the model cannot be cut this way."""

    def refuse(what: str, why: str) -> None:
        raise InputError(what, where="layout", why=why, next=f"Change parallelism {layout} or the model.")

    for noun, count in (
        ("heads", shape.heads),
        ("KV heads", shape.kv_heads),
        ("FFN columns", shape.ffn_dim),
        ("vocabulary entries", shape.vocabulary),
    ):
        if count % layout.tp:
            refuse(f"tensor parallel {layout.tp} does not fit", f"it does not divide {count:,} {noun}")
    if shape.layers + 2 < layout.pp * chunks:
        stages = f"pipeline parallel {layout.pp}" + (f" with {chunks} chunks" if chunks > 1 else "")
        refuse(f"{stages} does not fit", f"the model has {shape.layers} layers, embedding and output")
    if chunks > 1 and layout.pp == 1:
        refuse(f"{chunks} chunks do not fit", "there is one pipeline rank")
    if replicas % layout.dp:
        refuse(f"{layout.dp} replicas do not fit", f"they do not divide the {replicas} that were asked for")
    if shape.dim % shape.heads or shape.head_dim % 2:
        refuse(f"dim {shape.dim} does not fit", f"it is no even multiple of {shape.heads} heads")
    if shape.heads % shape.kv_heads:
        refuse(f"{shape.kv_heads} KV heads do not fit", f"they do not divide {shape.heads} heads")


def _block(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
