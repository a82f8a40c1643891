"""Starting from weights that exist: each rank reads just the rectangles that it owns."""

from dataclasses import fields
from pathlib import Path

import torch.distributed as dist

from keepstep.core.errors import InputError
from keepstep.llama.checkpoint import verify
from keepstep.llama.checkpoint.pieces import owned_pieces
from keepstep.llama.checkpoint.saver import as_fields
from keepstep.llama.flat import FlatState
from keepstep.llama.shape import ModelShape
from keepstep.llama.weights.part import Part
from keepstep.llama.weights.sources import CheckpointSource, open_source


def init_from(
    folder: Path, state: FlatState, shape: ModelShape, *, group: dist.ProcessGroup | None = None
) -> None:
    """Fill the owned master weights; moments and step stay at zero. Every rank calls it.

    `group` lets the ranks share the check of a keepstep checkpoint. InputError if the folder holds no
    weights, or those of another model. `state.weights` is the caller's to refresh.
    """
    source = open_source(folder)
    if isinstance(source, CheckpointSource):
        verify(folder, model=as_fields(shape), group=group)
    else:
        check_shape(source.shape, shape, folder)
    pieces = owned_pieces(state.index, state.dp_rank)
    source.fill(
        [
            Part(p.name, p.offset, state.master[p.start : p.start + p.numel].view(p.size))
            for p in pieces
        ]
    )  # fmt: skip


def check_shape(there: ModelShape, here: ModelShape, folder: Path) -> None:
    """InputError that names every field in which a folder's model is another one."""
    different = [
        f"{field.name} is {getattr(there, field.name)} there and {getattr(here, field.name)} here"
        for field in fields(ModelShape)
        if field.name != "max_seq" and getattr(there, field.name) != getattr(here, field.name)
    ]
    if different:
        raise InputError(
            "the weights are of another model",
            where=str(folder),
            why="; ".join(different),
            next="Set the model of the job to the sizes of the weights.",
        )
