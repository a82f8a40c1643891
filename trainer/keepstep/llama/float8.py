"""Products of the layers' matrices in float8: what is multiplied is rounded to e4m3, each row by a scale of
its own; sums are made in higher precision and given in bf16.

Activations with weights in the forward pass, their gradients with weights in the backward pass: two thirds of
the work. Gradients of weights are products in bf16, as are output and embedding, where rounding did most harm
in others' experience (torchao's recipe "rowwise_with_gw_hp"). Scales are powers of two, so scaling rounds
nothing. Weights are rounded anew for each product: there is no state beside those of training in bf16.

GPUs multiply so from compute capability 8.9 on. A CPU does it for tests, slowly.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from keepstep.core.errors import InputError
from keepstep.core.layout import Layout
from keepstep.llama.shape import ModelShape

_UNIT = 16  # elements that rows and columns of a matrix must be whole multiples of
_CAPABILITY = 8, 9


def multiply8(x: Tensor, weight: Tensor, quantised: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """x [n, in] times weight [out, in] transposed, both rounded; in bf16."""
    (rows, row_scales), (columns, column_scales) = quantised(x), quantised(weight)
    return scaled_mm(
        rows, columns.t(), row_scales, ScalingType.RowWise, column_scales.t(), ScalingType.RowWise,
        output_dtype=torch.bfloat16,
    )  # fmt: skip


def check_device(device: torch.device) -> None:
    """InputError where it cannot be computed, or not fast."""
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < _CAPABILITY:
        named = "a CPU" if found is None else f"compute capability {found[0]}.{found[1]}"
        raise InputError(
            "float8 cannot be used here", where="numerics.float8", why=f"this rank has {named}",
            next="Leave it out: GPUs of compute capability 8.9 and more can (Ada, Hopper, Blackwell).",
        )  # fmt: skip


def check_shape(shape: ModelShape, layout: Layout, precision: str) -> None:
    """InputError for matrices whose parts are no whole multiples, and for computing in fp32."""
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    for noun, size in (
        ("dim", shape.dim),
        ("dim of queries on a rank", shape.dim // layout.tp),
        ("columns of queries, keys and values on a rank", heads // layout.tp),
        ("FFN columns on a rank", shape.ffn_dim // layout.tp),
    ):
        if size % _UNIT:
            raise InputError(
                f"float8 does not fit {size:,} {noun}", where="numerics.float8",
                why=f"they are no multiple of {_UNIT}",
                next="Change the model or tensor parallelism, or leave it out.",
            )  # fmt: skip
    if precision == "fp32":
        raise InputError(
            "float8 and fp32 exclude each other", where="numerics.float8",
            why="products are given in bf16", next="Leave precision out, or float8.",
        )  # fmt: skip
