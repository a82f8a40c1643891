"""Attention of a micro-batch's tokens, each to earlier ones of its own document.

No mask is larger than `MASK`: whole documents need none on CPU, windows of context parallel ranks are cut.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from keepstep.llama.microbatch import MicroBatch, Window, cut_window

MASK = 2**24  # elements


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


def _windowed(q: Tensor, k: Tensor, v: Tensor, windows: Sequence[Window]) -> Tensor:
    """The last of a window's keys is its last query's own, and each query before sees one less."""
    parts, start = [], 0
    for window in windows:
        rows, keys = slice(start, start + window[0]), slice(*window[1:])
        large = len(cut_window(window, MASK)) > 1
        parts.append((_Blocks.apply if large else _seen)(q[rows], k[keys], v[keys]))
        start = rows.stop
    return torch.cat(parts)


def _seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of a window's queries over its keys."""
    mask, (count, keys) = None, (len(q), len(k))
    if count < keys:
        mask = torch.ones(count, keys, dtype=torch.bool, device=q.device).tril_(keys - count)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out.squeeze(0).transpose(0, 1)


class _Blocks(Function):
    """The same, some queries at a time, each block run again in the backward pass: no large mask is held."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.cat([_seen(q[rows], k[:stop], v[:stop]) for rows, stop in _blocks(q, k)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, stop in _blocks(q, k):
            block = [x.detach().requires_grad_() for x in (q[rows], k[:stop], v[:stop])]
            with torch.enable_grad():
                out = _seen(*block)
            dq[rows], dk_part, dv_part = torch.autograd.grad(out, block, dy[rows])
            dk[:stop] += dk_part
            dv[:stop] += dv_part
        return dq, dk, dv


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, int]]:
    """Queries, and how many keys the last of them sees."""
    start = 0
    for count, _, stop in cut_window((len(q), 0, len(k)), MASK):
        yield slice(start, start + count), stop
        start += count


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out: Tensor = _compiled()(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    return out.squeeze(0).transpose(0, 1)
