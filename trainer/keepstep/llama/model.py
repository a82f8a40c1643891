"""Llama 3 as one pipeline stage of one tensor shard, computing on the views of flat buffers.

RMSNorm before each block, rotary positions in Hugging Face's half-split convention, grouped-query
attention, SwiGLU, untied embeddings (arXiv 2407.21783, section 3.2). A token sees earlier tokens of its own
document only.

Activations are [tokens, dim] with the sequences of a micro-batch end to end. wq, wk, wv are neighbours in the
flat buffer, so they are one matrix here; so are w1 and w3.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from keepstep.core.footprint import LOGITS
from keepstep.core.layout import stage_layers
from keepstep.llama.attention import attend
from keepstep.llama.backward import backward
from keepstep.llama.flat import FlatState
from keepstep.llama.float8 import multiply8
from keepstep.llama.kernels import PLAIN, Kernels
from keepstep.llama.microbatch import MicroBatch
from keepstep.llama.shape import ModelShape
from keepstep.llama.sharding import Sharded, linked, within
from keepstep.llama.tensor_parallel import Peers, add_product, cross_entropy, embedding, multiply, row_linear


class RmsNorm:
    def __init__(self, state: FlatState, name: str, eps: float) -> None:
        self.weight, self.grad, self.eps = state.weight(name), state.grad(name), eps


class Matrix:
    """A weight, or neighbours stacked, with its gradient."""

    def __init__(self, state: FlatState, *names: str) -> None:
        self.weight, self.grad = state.weight(*names), state.grad(*names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What a stage computes with, the same for all its layers."""

    tp: Peers = field(default_factory=Peers)
    cp: Peers = field(default_factory=lambda: Peers(along="cp"))
    kernels: Kernels = PLAIN
    recompute: str = "none"
    units: Mapping[str, Sharded] = field(default_factory=dict)  # by name; none: nothing comes and goes
    float8: bool = False

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """A product of a layer's matrix with activations, or with their gradients."""
        return multiply8(x, weight, self.kernels.quantised) if self.float8 else multiply(x, weight)

    @property
    def keep(self) -> bool:
        """Whether what is cheap to make again is kept for the backward pass."""
        return self.recompute != "selective"


class _NormColumn(Function):
    """[tokens/tp, dim] -> RMSNorm -> gathered -> [tokens, out/tp]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: RmsNorm, matrix: Matrix, means: Means) -> Tensor:
        inverse = means.kernels.inverse_rms(x, norm.eps)
        whole = means.tp.gather(means.kernels.normed(x, inverse, norm.weight))
        ctx.save_for_backward(x, inverse, whole if means.keep else None)
        ctx.of = norm, matrix, means
        return means.multiply(whole, matrix.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        x, inverse, whole = ctx.saved_tensors
        norm, matrix, means = ctx.of
        if whole is None:
            whole = means.tp.gather(means.kernels.normed(x, inverse, norm.weight))
        dnormed = means.tp.scatter_sum(means.multiply(dy, matrix.weight.t()))
        add_product(matrix.grad, dy, whole)
        dx, dweight = means.kernels.norm_backward(dnormed, x, inverse, norm.weight)
        norm.grad.add_(dweight)
        return dx, None, None, None


class _SwiGluRow(Function):
    """[tokens, 2 ffn/tp] -> SwiGLU -> [tokens/tp, dim]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, matrix: Matrix, means: Means) -> Tensor:
        hidden = means.kernels.swiglu(gate_up)
        ctx.save_for_backward(gate_up, hidden if means.keep else None)
        ctx.of = matrix, means
        return means.tp.scatter_sum(means.multiply(hidden, matrix.weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        gate_up, hidden = ctx.saved_tensors
        matrix, means = ctx.of
        if hidden is None:
            hidden = means.kernels.swiglu(gate_up)
        dy = means.tp.gather(dy)
        add_product(matrix.grad, dy, hidden)
        return means.kernels.swiglu_backward(means.multiply(dy, matrix.weight.t()), gate_up), None, None


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return kernels.rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.kernels.rotated(dy, cos, sin, -1), None, None, None


class _HeadLoss(Function):
    """Norm, output and loss, a chunk of the tokens after the other: logits exist for one chunk at a time.

    So gradients are made in the forward pass, where the logits are; backward passes begin with this loss, so
    its own gradient is 1.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: RmsNorm, output: Matrix, batch: MicroBatch, means: Means
    ) -> Tensor:
        assert batch.targets is not None
        inverse = means.kernels.inverse_rms(x, norm.eps)
        whole = means.tp.gather(means.kernels.normed(x, inverse, norm.weight))
        learns = ctx.needs_input_grad[0]
        loss = torch.zeros((), device=x.device)
        size = max(1, LOGITS // len(output.weight))
        dwhole = torch.empty_like(whole) if learns and size < len(whole) else whole
        for start in range(0, len(whole), size):
            rows = slice(start, start + size)
            logits = multiply(whole[rows], output.weight)
            part, dlogits = cross_entropy(logits, batch.targets[rows], batch.scale, means.tp)
            loss += part
            if learns:
                add_product(output.grad, dlogits, whole[rows])
                dpart = multiply(dlogits, output.weight.t())
                if size < len(whole):
                    dwhole[rows] = dpart
                else:
                    dwhole = dpart
        if learns:
            dnormed = means.tp.scatter_sum(dwhole)
            dx, dweight = means.kernels.norm_backward(dnormed, x, inverse, norm.weight)
            norm.grad.add_(dweight)
            ctx.save_for_backward(dx)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _one: Tensor) -> tuple[Tensor, None, None, None, None]:
        (dx,) = ctx.saved_tensors
        return dx, None, None, None, None


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


class _Recomputed(Function):
    """A layer that keeps its input alone, and is run again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "Layer", batch: MicroBatch) -> Tensor:
        ctx.save_for_backward(x)
        ctx.of = layer, batch
        return layer.run(x, batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        layer, batch = ctx.of
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            backward(layer.run(x, batch), dy)
        return x.grad, None, None


class Layer:
    def __init__(self, shape: ModelShape, state: FlatState, layer: int, means: Means) -> None:
        at = f"layers.{layer}"
        self.means, self.unit = means, means.units.get(at)
        self.heads, self.kv_heads = shape.heads // means.tp.size, shape.kv_heads // means.tp.size
        self.head_dim = shape.head_dim
        self.attention_norm = RmsNorm(state, f"{at}.attention_norm.weight", shape.norm_eps)
        self.qkv = Matrix(state, *(f"{at}.attention.{w}.weight" for w in ("wq", "wk", "wv")))
        self.wo = Matrix(state, f"{at}.attention.wo.weight")
        self.ffn_norm = RmsNorm(state, f"{at}.ffn_norm.weight", shape.norm_eps)
        self.gate_up = Matrix(state, *(f"{at}.feed_forward.{w}.weight" for w in ("w1", "w3")))
        self.down = Matrix(state, f"{at}.feed_forward.w2.weight")

    def __call__(self, x: Tensor, batch: MicroBatch) -> Tensor:
        if self.means.recompute == "full":
            return within(self.unit, lambda x: _Recomputed.apply(x, self, batch), x)
        return within(self.unit, lambda x: self.run(x, batch), x)

    def run(self, x: Tensor, batch: MicroBatch) -> Tensor:
        x = x + self.attention(x, batch)
        gate_up = _NormColumn.apply(x, self.ffn_norm, self.gate_up, self.means)
        out: Tensor = x + _SwiGluRow.apply(gate_up, self.down, self.means)
        return out

    def attention(self, x: Tensor, batch: MicroBatch) -> Tensor:
        means = self.means
        projected = _NormColumn.apply(x, self.attention_norm, self.qkv, means)
        projected = projected.view(len(projected), -1, self.head_dim)
        rotating, v = torch.split(projected, [self.heads + self.kv_heads, self.kv_heads], dim=1)
        rotated = _Rotate.apply(rotating, batch.cos, batch.sin, means.kernels)
        q, k = torch.split(rotated, [self.heads, self.kv_heads], dim=1)
        if batch.order is None:
            v = v.contiguous()  # a view would keep all that was projected until the backward pass
        else:
            k, v = _GatheredContext.apply(torch.stack((k, v), dim=1), batch.order, means.cp).unbind(1)
        mixed = attend(q, k, v, batch)
        mixed = mixed.reshape(len(mixed), -1)
        return row_linear(mixed, self.wo.weight, self.wo.grad, means.tp, means.multiply)


class Stage:
    """The layers of a (virtual) stage: before the first the embedding, after the last norm, output, loss."""

    def __init__(
        self, shape: ModelShape, state: FlatState, means: Means, *, stages: int = 1, stage: int = 0
    ) -> None:
        self.means, self.first, self.last = means, stage == 0, stage == stages - 1
        self.layers = [Layer(shape, state, i, means) for i in stage_layers(shape.layers, stages, stage)]
        if self.first:
            self.embedding = Matrix(state, "embedding.weight")
        if self.last:
            self.norm = RmsNorm(state, "norm.weight", shape.norm_eps)
            self.output = Matrix(state, "output.weight")
        self.head = means.units.get("output") if self.last else None
        self.table = means.units.get("embedding") if self.first else None
        linked([self.table, *(layer.unit for layer in self.layers), self.head])

    def __call__(self, x: Tensor, *, batch: MicroBatch) -> Tensor:
        """x is [tokens] in the first stage, else [tokens/tp, dim]; gives the latter, or the scaled loss."""
        if self.first:
            x = self._embedded(batch.tokens)
        for layer in self.layers:
            x = layer(x, batch)
        if not self.last:
            return x
        if batch.targets is None:
            return _NormColumn.apply(x, self.norm, self.output, self.means)  # type: ignore[no-any-return]
        return self._loss(x, batch)

    def _embedded(self, tokens: Tensor) -> Tensor:
        table, means = self.embedding, self.means
        anchor = torch.zeros((), device=table.grad.device, requires_grad=True)
        return within(
            self.table,
            lambda anchor: embedding(anchor, tokens, table.weight, table.grad, means.tp),
            anchor,
        )  # fmt: skip

    def _loss(self, x: Tensor, batch: MicroBatch) -> Tensor:
        learns = torch.is_grad_enabled() and x.requires_grad
        if self.head is not None:  # both passes are one
            self.head.gather()
            if learns:
                self.head.expect()
        loss: Tensor = _HeadLoss.apply(x, self.norm, self.output, batch, self.means)
        if self.head is not None and learns:
            self.head.collect()
        return loss
