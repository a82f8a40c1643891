"""Llama 3 as one pipeline stage of one tensor shard, computing on the views of flat buffers.

RMSNorm before each block, rotary positions in Hugging Face's half-split convention, grouped-query
attention, SwiGLU, untied embeddings (arXiv 2407.21783, section 3.2). A token sees earlier tokens of its own
document only.

Activations are [tokens, dim] with the sequences of a micro-batch end to end. wq, wk, wv are neighbours in the
flat buffer, so they are one matrix here; so are w1 and w3.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from keepstep.llama.flat import FlatState, stage_layers
from keepstep.llama.microbatch import MicroBatch
from keepstep.llama.shape import ModelShape
from keepstep.llama.tensor_parallel import (
    Peers,
    column_linear,
    cross_entropy,
    embedding,
    row_linear,
)


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        norm = torch.linalg.vector_norm(x32, dim=1, keepdim=True)
        inverse = norm.square_().div_(x.shape[1]).add_(eps).rsqrt_()
        unit = x32 * inverse
        ctx.save_for_backward(unit, inverse, weight)
        ctx.grad, ctx.dtype = grad, x.dtype
        out: Tensor = (unit * weight).to(x.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        unit, inverse, weight = ctx.saved_tensors
        dy = dy.float()
        product = dy * unit
        ctx.grad.add_(product.sum(dim=0))
        mean = torch.mv(product, weight.float()).div_(unit.shape[1]).unsqueeze(1)
        dx = (dy * weight).addcmul_(unit, mean, value=-1).mul_(inverse)
        return dx.to(ctx.dtype), None, None, None


class _Rotate(Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) for the two halves of each head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (to_a, to_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=sign)
    return out


class _SwiGlu(Function):
    """silu(gate) * up, of [tokens, 2 ffn] that holds both side by side."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=1)
        out = torch.empty_like(gate_up)
        to_gate, to_up = out.chunk(2, dim=1)
        torch.mul(F.silu(gate), dy, out=to_up)
        to_gate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
        return out


class _GatheredContext(Function):
    """[tokens, ...] of each context parallel rank -> [all tokens, ...], in the order of the sequences."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, cp: Peers) -> Tensor:
        ctx.save_for_backward(order)
        ctx.cp = cp
        return cp.gather(x)[order]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return ctx.cp.scatter_sum(torch.empty_like(dy).index_copy_(0, order, dy)), None, None


class RmsNorm:
    def __init__(self, state: FlatState, name: str, eps: float) -> None:
        self.weight, self.grad, self.eps = state.weight(name), state.grad(name), eps

    def __call__(self, x: Tensor) -> Tensor:
        return _RmsNorm.apply(x, self.weight, self.grad, self.eps)  # type: ignore[no-any-return]


class Matrix:
    """A weight, or neighbours stacked, with its gradient."""

    def __init__(self, state: FlatState, *names: str) -> None:
        self.weight, self.grad = state.weight(*names), state.grad(*names)


class Layer:
    def __init__(self, shape: ModelShape, state: FlatState, layer: int, tp: Peers, cp: Peers) -> None:
        at = f"layers.{layer}"
        self.tp, self.cp = tp, cp
        self.heads, self.kv_heads = shape.heads // tp.size, shape.kv_heads // tp.size
        self.head_dim = shape.head_dim
        self.attention_norm = RmsNorm(state, f"{at}.attention_norm.weight", shape.norm_eps)
        self.qkv = Matrix(state, *(f"{at}.attention.{w}.weight" for w in ("wq", "wk", "wv")))
        self.wo = Matrix(state, f"{at}.attention.wo.weight")
        self.ffn_norm = RmsNorm(state, f"{at}.ffn_norm.weight", shape.norm_eps)
        self.gate_up = Matrix(state, *(f"{at}.feed_forward.{w}.weight" for w in ("w1", "w3")))
        self.down = Matrix(state, f"{at}.feed_forward.w2.weight")

    def __call__(self, x: Tensor, batch: MicroBatch) -> Tensor:
        x = x + self.attention(self.attention_norm(x), batch)
        return x + self.feed_forward(self.ffn_norm(x))

    def attention(self, x: Tensor, batch: MicroBatch) -> Tensor:
        projected = column_linear(x, self.qkv.weight, self.qkv.grad, self.tp)
        projected = projected.view(len(projected), -1, self.head_dim)
        rotating, v = torch.split(projected, [self.heads + self.kv_heads, self.kv_heads], dim=1)
        rotated = _Rotate.apply(rotating, batch.cos, batch.sin)
        q, k = torch.split(rotated, [self.heads, self.kv_heads], dim=1)
        if batch.order is not None:
            k, v = _GatheredContext.apply(torch.stack((k, v), dim=1), batch.order, self.cp).unbind(1)
        mixed = attend(q, k, v, batch)
        return row_linear(mixed.reshape(len(mixed), -1), self.wo.weight, self.wo.grad, self.tp)

    def feed_forward(self, x: Tensor) -> Tensor:
        gate_up = column_linear(x, self.gate_up.weight, self.gate_up.grad, self.tp)
        hidden: Tensor = _SwiGlu.apply(gate_up)
        return row_linear(hidden, self.down.weight, self.down.grad, self.tp)


def attend(q: Tensor, k: Tensor, v: Tensor, batch: MicroBatch) -> Tensor:
    """Causal attention inside each document; q [tokens, heads, head_dim], k and v with the KV heads.

    Where the context is cut, q are this rank's tokens, k and v those of the whole sequences. On CPU each
    document is a call of its own, so no mask exists and no work is spent across documents; documents of one
    length (whole sequences, as a rule) share a call. On CUDA a block mask does the same.
    """
    if batch.mask is not None:
        return _flex(q, k, v, batch.mask)
    if batch.windows:
        return _windowed(q, k, v, batch.windows)
    spans = batch.spans
    if len(set(spans)) == 1:
        return _causal(q, k, v, len(spans))
    parts = zip(*(torch.split(x, list(spans)) for x in (q, k, v)), strict=True)
    return torch.cat([_causal(q, k, v, 1) for q, k, v in parts])


def _causal(q: Tensor, k: Tensor, v: Tensor, documents: int) -> Tensor:
    q, k, v = (x.reshape(documents, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _windowed(q: Tensor, k: Tensor, v: Tensor, windows: Sequence[tuple[int, int, int]]) -> Tensor:
    """The last of a window's keys is its last query's own, and each query before sees one less."""
    parts, start = [], 0
    for count, begin, end in windows:
        rows, keys = slice(start, start + count), slice(begin, end)
        q_, k_, v_ = (x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[keys], v[keys]))
        seen = None
        if count < end - begin:
            seen = torch.ones(count, end - begin, dtype=torch.bool, device=q.device).tril_(
                end - begin - count
            )
        out = F.scaled_dot_product_attention(
            q_, k_, v_, attn_mask=seen, is_causal=seen is None, enable_gqa=k.shape[1] != q.shape[1]
        )
        parts.append(out.squeeze(0).transpose(0, 1))
        start += count
    return torch.cat(parts)


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out: Tensor = _compiled()(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    return out.squeeze(0).transpose(0, 1)


class Stage:
    """The layers of a (virtual) stage: before the first the embedding, after the last norm, output, loss."""

    def __init__(
        self,
        shape: ModelShape,
        state: FlatState,
        tp: Peers,
        cp: Peers | None = None,
        *,
        stages: int = 1,
        stage: int = 0,
    ) -> None:
        cp = cp or Peers(along="cp")
        self.tp, self.first, self.last = tp, stage == 0, stage == stages - 1
        self.layers = [Layer(shape, state, i, tp, cp) for i in stage_layers(shape.layers, stages, stage)]
        if self.first:
            self.embedding = Matrix(state, "embedding.weight")
        if self.last:
            self.norm = RmsNorm(state, "norm.weight", shape.norm_eps)
            self.output = Matrix(state, "output.weight")

    def __call__(self, x: Tensor, *, batch: MicroBatch) -> Tensor:
        """x is [tokens] in the first stage, else [tokens/tp, dim]; gives the latter, or the scaled loss."""
        if self.first:
            x = embedding(batch.tokens, self.embedding.weight, self.embedding.grad, self.tp)
        for layer in self.layers:
            x = layer(x, batch)
        if not self.last:
            return x
        logits = column_linear(self.norm(x), self.output.weight, self.output.grad, self.tp)
        if batch.targets is None:
            return logits
        return cross_entropy(logits, batch.targets, batch.scale, self.tp)
