"""Initial weights, equal in every layout: each block of rows has a generator seeded by name."""

import hashlib

import torch

from keepstep.llama.flat import FlatParameter, FlatState
from keepstep.llama.shape import ModelShape

ROWS = 4096  # a block's rows: bounds the memory needed beside the local shard
DEVIATION = 0.02


def initialise(state: FlatState, shape: ModelShape, seed: int) -> None:
    """Fill the owned ranges of the master weights: normal for matrices, ones for norms.

    Matrices that write into the residual stream start smaller, by the square root of their number, so that
    its variance does not grow with depth.
    """
    index = state.index
    for unit, owned in zip(index.units, index.owned(state.dp_rank), strict=True):
        master = state.master[index.local(unit)]
        for parameter in unit.parameters:
            start, stop = max(owned.start, parameter.offset), min(owned.stop, parameter.span.stop)
            if start < stop:
                values = _values(parameter, shape, seed).reshape(-1)
                here = values[start - parameter.offset : stop - parameter.offset]
                master[start - owned.start : stop - owned.start].copy_(here)


def _values(parameter: FlatParameter, shape: ModelShape, seed: int) -> torch.Tensor:
    """The local part of one parameter."""
    if parameter.tp_dim is None:
        return torch.ones(parameter.shape)
    deviation = DEVIATION
    if parameter.name.split(".")[-2] in ("wo", "w2"):
        deviation /= (2 * shape.layers) ** 0.5
    rows, columns = parameter.global_shape
    out = torch.empty(parameter.shape)
    start = parameter.tp_offset
    for block in range(0, rows, ROWS):
        stop = min(block + ROWS, rows)
        low, high = max(block, start), min(stop, start + parameter.shape[0])
        if parameter.tp_dim == 0 and low >= high:
            continue
        digest = hashlib.sha256(f"{seed}/{parameter.name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.randn(stop - block, columns, generator=generator).mul_(deviation)
        if parameter.tp_dim == 0:
            out[low - start : high - start] = values[low - block : high - block]
        else:
            out[block:stop] = values[:, start : start + parameter.shape[1]]
    return out
