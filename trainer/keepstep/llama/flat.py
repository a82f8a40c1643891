"""Flat buffers: all parameters of one (pipeline rank, tensor shard) end to end in one vector of units.

    unit         0 ............ matrices ...... used .. stop
                 | 2-D weights  | norm weights | padding |
    owned by     | cp 0            | cp 1                |     equal consecutive ranges, and of each of them
                 | dp 0   | dp 1   | dp 0   | dp 1       |     equal ranges again

Matrices come first: they are cut over the tensor parallel ranks and decay; norm weights come last: every
tensor parallel rank has them whole and they do not decay. So either kind is one slice.

A unit is what is gathered and reduced at once. Where only the optimizer's state is sharded there is one, the
whole; where gradients or parameters are, each layer, the embedding and the output (with its norm) is one:

    shard         weights                grads                  (on every rank)
    optimizer     the whole vector       the whole vector
    gradients     the whole vector       one unit
    parameters    one unit, or two       one unit               two: the next one is on its way (CUDA)

`state` holds fp32 master weights and both moments of the ranges this rank owns, unit after unit, in one
contiguous piece: a snapshot is one copy. The lengths do not depend on the present number of replicas, only on
the number the job asked for (`replicas`), so that a job that shrinks cuts the same vector into fewer, longer
pieces.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keepstep.core.errors import InputError
from keepstep.core.footprint import ALIGNMENT
from keepstep.core.layout import Coordinates, Layout, stage_layers
from keepstep.llama.shape import ModelShape


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
class Unit:
    """A range of the flat index that is gathered and reduced at once."""

    number: int
    parameters: tuple[FlatParameter, ...]
    start: int
    matrices: int  # where norm weights start
    used: int  # where padding starts
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatIndex:
    """The table of one (pipeline rank with all its chunks, tensor shard), the same on all its replicas."""

    units: tuple[Unit, ...]
    replicas: int  # that the job asked for; the present dp divides it
    dp: int
    cp: int
    cp_rank: int

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        layout: Layout,
        at: Coordinates,
        *,
        replicas: int = 0,
        chunks: int = 1,
        shard: str = "optimizer",
    ) -> "FlatIndex":
        replicas = replicas or layout.dp
        check_layout(shape, layout, replicas, chunks)
        stages = layout.pp * chunks
        sizes = [s for stage in range(at.pp, stages, layout.pp) for s in stage_sizes(shape, stages, stage)]
        together = [sizes]
        if shard != "optimizer":
            together = [list(group) for _, group in itertools.groupby(sizes, lambda size: unit_of(size[0]))]
        units, offset = [], 0
        for number, part in enumerate(together):
            unit = _placed(part, layout, at, number, offset, layout.cp * replicas * ALIGNMENT)
            units.append(unit)
            offset = unit.stop
        return cls(units=tuple(units), replicas=replicas, dp=layout.dp, cp=layout.cp, cp_rank=at.cp)

    @property
    def parameters(self) -> Iterator[FlatParameter]:
        return (parameter for unit in self.units for parameter in unit.parameters)

    @property
    def length(self) -> int:
        return self.units[-1].stop

    @property
    def largest(self) -> int:
        """Elements of the largest unit."""
        return max(map(len, self.units))

    @property
    def shard(self) -> int:
        """Elements that each rank owns."""
        return self.length // (self.cp * self.dp)

    def segment(self, unit: Unit) -> range:
        """What the replicas of this context parallel rank share of it: the same however many there are."""
        size = len(unit) // self.cp
        return range(unit.start + self.cp_rank * size, unit.start + (self.cp_rank + 1) * size)

    def owned(self, dp_rank: int) -> tuple[range, ...]:
        """Of each unit the range that a rank owns; they lie end to end in its state."""
        owned = []
        for unit in self.units:
            size = len(unit) // (self.cp * self.dp)
            start = self.segment(unit).start + dp_rank * size
            owned.append(range(start, start + size))
        return tuple(owned)

    def local(self, unit: Unit) -> slice:
        """Where a rank's range of it lies in the rank's state."""
        ranks = self.cp * self.dp
        return slice(unit.start // ranks, unit.stop // ranks)

    def __getitem__(self, name: str) -> tuple[Unit, FlatParameter]:
        return next((unit, p) for unit in self.units for p in unit.parameters if p.name == name)


def _placed(
    sizes: Sequence[tuple[str, tuple[int, ...]]],
    layout: Layout,
    at: Coordinates,
    number: int,
    start: int,
    multiple: int,
) -> Unit:
    """Names and global shapes as a unit from `start` on, whose length is a multiple of so many elements."""
    ordered = [s for s in sizes if len(s[1]) > 1] + [s for s in sizes if len(s[1]) == 1]
    parameters, offset, matrices = [], start, start
    for name, size in ordered:
        dim = tp_dim(name)
        local, first = list(size), 0
        if dim is not None:
            local[dim] //= layout.tp
            first = at.tp * local[dim]
        placed = FlatParameter(
            name=name, shape=tuple(local), global_shape=size, tp_dim=dim, tp_offset=first, offset=offset
        )
        parameters.append(placed)
        offset += placed.numel
        matrices = offset if dim is not None else matrices
    stop = start + -(-(offset - start) // multiple) * multiple
    return Unit(
        number=number, parameters=tuple(parameters), start=start, matrices=matrices, used=offset, stop=stop
    )


class FlatState:
    """The buffers of one rank. `step` counts completed updates."""

    def __init__(
        self,
        index: FlatIndex,
        dp_rank: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        shard: str = "optimizer",
        ahead: bool = False,
    ) -> None:
        """`ahead`: where parameters are sharded, room for a second unit's weights."""
        self.index, self.dp_rank, self.step = index, dp_rank, 0
        self.state = torch.zeros(3 * index.shard, device=device)
        self.master, self.exp_avg, self.exp_avg_sq = torch.split(self.state, index.shard)
        # Who owns everything in fp32 computes with the master weights themselves: nothing to copy.
        self.shared = index.dp * index.cp == 1 and dtype == torch.float32
        # What a rank holds whole: all units, or windows that they share by turns.
        self.parameters_sharded = shard == "parameters"
        self.gradients_sharded = shard != "optimizer"
        self.ahead = ahead
        self._windows = 1 + ahead if self.parameters_sharded and not self.shared else 0
        if self.shared:
            self.weights = self.master
        else:
            held = self._windows * index.largest if self._windows else index.length
            self.weights = torch.zeros(held, device=device, dtype=dtype)
        held = index.largest if self.gradients_sharded else index.length
        self.grads = torch.zeros(held, device=device)  # fp32: sums of many micro-batches

    def weights_of(self, unit: Unit) -> Tensor:
        """[len(unit)], whether they are there now or not."""
        start = unit.number % self._windows * self.index.largest if self._windows else unit.start
        return self.weights[start : start + len(unit)]

    def grads_of(self, unit: Unit) -> Tensor:
        start = 0 if self.gradients_sharded else unit.start
        return self.grads[start : start + len(unit)]

    def weight(self, *names: str) -> Tensor:
        return self._view(self.weights_of, names)

    def grad(self, *names: str) -> Tensor:
        return self._view(self.grads_of, names)

    def _view(self, buffer: Callable[[Unit], Tensor], names: Iterable[str]) -> Tensor:
        """One parameter's view, or that of neighbours stacked along their first dimension."""
        (unit, first), *others = (self.index[name] for name in names)
        stop, rows = first.span.stop, first.shape[0]
        for _, other in others:
            assert other.offset == stop and other.shape[1:] == first.shape[1:], other.name
            stop, rows = other.span.stop, rows + other.shape[0]
        return buffer(unit)[first.offset - unit.start : stop - unit.start].view(rows, *first.shape[1:])


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


def unit_of(name: str) -> str:
    """The unit of a parameter, where units are layers: the last norm goes with the output."""
    return "output" if name == "norm.weight" else _block(name)


def _block(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
