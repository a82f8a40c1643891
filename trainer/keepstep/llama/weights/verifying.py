"""Whether weights are whole: every parameter there, of its shape, finite; and the same as others."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from keepstep.core.errors import KeepstepError
from keepstep.llama.checkpoint import verify as verify_checkpoint
from keepstep.llama.shape import ModelShape
from keepstep.llama.weights.part import Part
from keepstep.llama.weights.reading import check_shape
from keepstep.llama.weights.sources import CheckpointSource, Source, open_source

_BLOCK = 1 << 24  # elements that are in memory at a time


class BadWeights(KeepstepError):
    """Weights that are there, and are not what they should be."""


@dataclass(frozen=True, slots=True)
class Verified:
    shape: ModelShape
    difference: float | None  # the greatest from the others'; None: there were none to compare with


def verify_weights(folder: Path, against: Path | None = None, *, tolerance: float = 0.0) -> Verified:
    """Reads everything, a block of rows at a time.

    InputError for what is missing or of another shape, CorruptCheckpoint for damaged files, BadWeights for
    numbers that are not finite or differ from the others' by more than `tolerance`.
    """
    sources = [open_source(path) for path in (folder, *([against] if against else []))]
    for path, source in zip((folder, against), sources, strict=False):
        if isinstance(source, CheckpointSource) and path is not None:
            verify_checkpoint(path)
    if against is not None:
        check_shape(sources[0].shape, sources[1].shape, folder)
    greatest = 0.0
    for name, size in sources[0].shape.sizes():
        for row, blocks in _blocks(sources, name, size):
            if not bool(torch.isfinite(blocks[0]).all()):
                raise BadWeights(f"{name} is not finite", where=str(folder), why=f"near row {row:,}")
            if len(blocks) > 1:
                difference = float((blocks[0] - blocks[1]).abs().max())
                if not difference <= tolerance:  # so that nan is seen, too
                    raise BadWeights(
                        f"{name} is another one", where=str(folder),
                        why=f"near row {row:,} it differs by {difference:.3g} from {against}",
                        next="A tolerance of the stored type's precision is given by --tolerance.",
                    )  # fmt: skip
                greatest = max(greatest, difference)
    return Verified(sources[0].shape, greatest if against else None)


def _blocks(sources: list[Source], name: str, size: tuple[int, ...]) -> Iterator[tuple[int, list[Tensor]]]:
    rest = size[1:]
    rows = max(1, _BLOCK // math.prod(rest))
    for row in range(0, size[0], rows):
        blocks = []
        for source in sources:
            blocks.append(torch.empty(min(rows, size[0] - row), *rest))
            source.fill([Part(name, (row, *(0 for _ in rest)), blocks[-1])])
        yield row, blocks
