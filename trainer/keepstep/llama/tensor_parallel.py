"""Tensor parallelism on plain tensors: matrices cut over a few ranks, tokens cut between the matrices.

    [tokens/tp, dim] --gather--> [tokens, dim] x columns -> ... x rows --sum, scatter--> [tokens/tp, dim]

Between two pairs of matrices (norms, residual stream, pipeline edges) each rank holds its share of the
tokens, as in Megatron's sequence parallelism. Tokens of all sequences of a micro-batch are one flat
dimension, so a share is one contiguous block and no collective ever sees a strided tensor, which gloo would
silently get wrong.

Gradients of weights are added into flat fp32 buffers by the backward functions themselves; autograd only
carries gradients of activations. With one rank nothing here communicates.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from keepstep.session import Session, current


class Peers:
    """The ranks along one dimension; `group` is None where this rank is alone."""

    def __init__(
        self, group: dist.ProcessGroup | None = None, session: Session | None = None, *, along: str = "tp"
    ) -> None:
        self.group, self._session, self._along = group, session or current(), along
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] of each rank -> [n * size, ...] on all of them."""
        if self.size == 1:
            return x
        whole = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self._session.wait(self._along)
        if x.is_cuda:
            dist.all_gather_into_tensor(whole, x.contiguous(), group=self.group)
        else:  # faster than gloo's own all-gather for activations of up to 0.5 MB a rank (2 ranks measured)
            dist.all_to_all_single(whole, x.repeat(self.size, *[1] * (x.dim() - 1)), group=self.group)
        self._session.go_on()
        return whole

    def scatter_sum(self, x: Tensor) -> Tensor:
        """[n * size, ...] -> this rank's [n, ...] of the sum over the ranks."""
        if self.size == 1:
            return x
        part = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        self._session.wait(self._along)
        reduce_scatter(part, x.contiguous(), self.group)
        self._session.go_on()
        return part

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """In place."""
        assert x.is_contiguous()
        if self.size > 1:
            self._session.wait(self._along)
            dist.all_reduce(x, op=op, group=self.group)
            self._session.go_on()
        return x


def reduce_scatter(part: Tensor, whole: Tensor, group: dist.ProcessGroup | None) -> None:
    """part = this rank's block of the sum of `whole` over the group, added in the order of the ranks.

    gloo has no reduce-scatter worth the name (it reduces everything everywhere): exchanging the blocks and
    adding them here took half the time or less on 2 and 4 ranks, and fixes the order of the additions.
    """
    if whole.is_cuda:
        dist.reduce_scatter_tensor(part, whole, group=group)
        return
    received = torch.empty_like(whole)
    dist.all_to_all_single(received, whole, group=group)
    blocks = received.view(-1, *part.shape)
    torch.add(blocks[0], blocks[1], out=part)
    for block in blocks[2:]:
        part.add_(block)


def _processor() -> str:
    """What the kernel says of the first core; nothing where it says nothing."""
    about = Path("/proc/cpuinfo")
    return about.read_text().partition("\n\n")[0] if about.is_file() else ""


# oneDNN's fp32 kernels run at twice the speed of MKL's on AMD Zen 5. On Intel's own (a Xeon with AVX-512) MKL
# is as fast or faster, and takes transposed matrices as they are, which oneDNN copies first.
_ONEDNN = (
    torch._C._has_mkldnn
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and not (torch._C.has_mkl and "GenuineIntel" in _processor())
)


def _by_onednn(x: Tensor) -> bool:
    return _ONEDNN and x.dtype == torch.float32 and not x.is_cuda


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in] times weight [out, in] transposed."""
    if _by_onednn(x):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return product
    plain: Tensor = F.linear(x, weight)
    return plain


def add_product(grad: Tensor, dy: Tensor, x: Tensor) -> None:
    """grad [out, in] += dy [n, out] transposed times x [n, in], in one call where precisions are equal."""
    if dy.dtype == grad.dtype and not _by_onednn(dy):
        grad.addmm_(dy.t(), x)
    else:
        grad.add_(multiply(dy.t(), x.t()))


class _Row(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, grad: Tensor, tp: Peers, product: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved: a weight is written to between the two passes where it is gathered twice.
        ctx.of = weight, grad, tp, product
        return tp.scatter_sum(product(x, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        weight, grad, tp, product = ctx.of
        dy = tp.gather(dy)
        add_product(grad, dy, x)
        return product(dy, weight.t()), None, None, None, None


def row_linear(
    x: Tensor, weight: Tensor, grad: Tensor, tp: Peers, product: Callable[..., Tensor] = multiply
) -> Tensor:
    """[tokens, in/tp] -> [tokens/tp, out]; grad [out, in/tp] is added to in the backward pass."""
    return _Row.apply(x, weight, grad, tp, product)  # type: ignore[no-any-return]


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tokens: Tensor, weight: Tensor, grad: Tensor, tp: Peers) -> Tensor:
        rows = tokens - tp.rank * weight.shape[0]
        if tp.size > 1:
            foreign = (rows < 0) | (rows >= weight.shape[0])
            out = F.embedding(rows.masked_fill(foreign, 0), weight).masked_fill_(foreign.unsqueeze(1), 0.0)
            rows = rows[~foreign]
            ctx.mine = ~foreign
        else:
            out, ctx.mine = F.embedding(rows, weight), None
        ctx.rows, ctx.grad, ctx.tp = rows, grad, tp
        return tp.scatter_sum(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, None, None]:
        dy = ctx.tp.gather(dy)
        if ctx.mine is not None:
            dy = dy[ctx.mine]
        ctx.grad.add_(torch.ops.aten.embedding_dense_backward(dy, ctx.rows, ctx.grad.shape[0], -1, False))
        return None, None, None, None, None


def embedding(anchor: Tensor, tokens: Tensor, weight: Tensor, grad: Tensor, tp: Peers) -> Tensor:
    """tokens [tokens] -> [tokens/tp, dim]; the table is cut along the vocabulary.

    `anchor` is any tensor that asks for a gradient, so that autograd calls the backward pass.
    """
    return _Embedding.apply(anchor, tokens, weight, grad, tp)  # type: ignore[no-any-return]


def cross_entropy(logits: Tensor, targets: Tensor, scale: float, tp: Peers) -> tuple[Tensor, Tensor]:
    """scale times the sum over tokens of -log softmax(logits)[target], in fp32; and its gradient.

    logits [tokens, vocabulary/tp]; targets [tokens], negative where no prediction counts.
    """
    columns = logits.shape[1]
    top = tp.all_reduce(logits.amax(dim=1).float(), dist.ReduceOp.MAX)
    odds = (logits.float() - top.unsqueeze(1)).exp_()
    index = targets - tp.rank * columns
    mine = (index >= 0) & (index < columns)
    index = index.clamp(0, columns - 1).unsqueeze(1)
    chosen = (logits.gather(1, index).squeeze(1).float() - top) * mine
    total, chosen = tp.all_reduce(torch.stack((odds.sum(dim=1), chosen)))
    weight = (targets >= 0) * scale
    loss = ((total.log() - chosen) * weight).sum()
    grad = odds.mul_((weight / total).unsqueeze(1)).scatter_add_(1, index, (-weight * mine).unsqueeze(1))
    return loss, grad.to(logits.dtype)
