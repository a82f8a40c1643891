"""The element-wise parts of a block, forward and backward: no matrices, no communication, nothing saved.

They are bound by memory bandwidth, so compiling makes each of them one pass over it. Blocks as a whole are
not compiled: their matrices are library calls already, and their backward functions add into flat buffers
and talk to other ranks, which a graph would have to be broken for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_E4M3_MAX, _TINY = 448.0, 1e-12


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """[n, dim] -> [n, 1] in fp32."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    inverse: Tensor = norm.square_().div_(x.shape[1]).add_(eps).rsqrt_()
    return inverse


def normed(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return (x * inverse).mul_(weight).to(x.dtype)


def norm_backward(dy: Tensor, x: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of input and weight, the latter in fp32."""
    unit, dy = x * inverse, dy.float()
    product = dy * unit
    mean = torch.mv(product, weight.float()).div_(x.shape[1]).unsqueeze(1)
    dx = (dy * weight).addcmul_(unit, mean, value=-1).mul_(inverse)
    return dx.to(x.dtype), product.sum(dim=0)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the two halves of each head; sign -1: backwards."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (to_a, to_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=sign)
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of [tokens, 2 ffn] that holds both side by side."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    out = torch.empty_like(gate_up)
    to_gate, to_up = out.chunk(2, dim=1)
    torch.mul(F.silu(gate), dy, out=to_up)
    to_gate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    return out


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] -> e4m3 numbers, and for each row the power of two that they are multiples of, [n, 1] fp32."""
    top = x.abs().amax(dim=1, keepdim=True).float().clamp(min=_TINY)
    scale = torch.exp2(torch.ceil(torch.log2(top / _E4M3_MAX)))
    return (x.float() / scale).to(torch.float8_e4m3fn).contiguous(), scale


def _rotated_compiled(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin * sign, b * cos + a * sin * sign), dim=-1)


def _swiglu_backward_compiled(dy: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return torch.cat((torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate) * dy), dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    inverse_rms: Callable[..., Tensor] = inverse_rms
    normed: Callable[..., Tensor] = normed
    norm_backward: Callable[..., tuple[Tensor, Tensor]] = norm_backward
    rotated: Callable[..., Tensor] = rotated
    swiglu: Callable[..., Tensor] = swiglu
    swiglu_backward: Callable[..., Tensor] = swiglu_backward
    quantised: Callable[..., tuple[Tensor, Tensor]] = quantised

    @classmethod
    def compiled(cls) -> "Kernels":
        """By torch.compile, at the first call. Two are put otherwise: views keep loops apart."""

        def one(kernel: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(kernel, dynamic=False, fullgraph=True)

        return cls(
            inverse_rms=one(inverse_rms), normed=one(normed), norm_backward=one(norm_backward),
            rotated=one(_rotated_compiled), swiglu=one(swiglu),
            swiglu_backward=one(_swiglu_backward_compiled), quantised=one(quantised),
        )  # fmt: skip


PLAIN = Kernels()
