"""The model for generation: weights as they are stored, and a cache of keys and values.

Prompts of different lengths are read end to end as one list of tokens, each attending to its own only, so
nothing is padded. After that a step is one token of each row, at that row's own position:

    keys of a layer   [rows, kv_heads, capacity, head_dim]
      row 0           x x x x x x .        length 6: a query of row 0 sees six keys
      row 1           x x x . . . .        length 3: the rest is masked

The query heads that share a KV head are the "queries" of one attention call, so keys are never repeated.
The numbers are those of the training model (model.py) in the same type; only the order of sums differs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from keepstep.core.errors import InputError
from keepstep.llama.microbatch import Rotation
from keepstep.llama.shape import ModelShape
from keepstep.llama.tensor_parallel import multiply
from keepstep.llama.weights.part import Part
from keepstep.llama.weights.sources import Source

# What attention is, in a forward pass: (layer, q, k, v) [tokens, heads, head_dim] -> the same as q.
_Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
_FEW = 64  # rows
_GROWTH = 256  # positions that a cache grows by


class Cache:
    """Keys and values of all layers, [layers, rows, kv_heads, capacity, head_dim]; `lengths` are per row."""

    def __init__(self, shape: ModelShape, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(
            shape.layers, rows, shape.kv_heads, 0, shape.head_dim, dtype=dtype, device=device
        )
        self.values = torch.empty_like(self.keys)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.longest = 0  # of lengths, known without asking the device

    def reserve(self, capacity: int) -> None:
        """Room for so many positions of each row."""
        short = capacity - self.keys.shape[3]
        if short > 0:
            short += -capacity % _GROWTH
            self.keys, self.values = (F.pad(x, (0, 0, 0, short)) for x in (self.keys, self.values))

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max()) if len(rows) else 0


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    qkv: Tensor  # wq, wk, wv
    wo: Tensor
    ffn_norm: Tensor
    gate_up: Tensor  # w1, w3
    down: Tensor


class Decoder:
    """A whole model on one device."""

    def __init__(self, source: Source, *, dtype: torch.dtype, device: torch.device) -> None:
        """Reads a layer at a time, into the place where it stays."""
        self.shape, self.dtype, self.device = source.shape, dtype, device
        self._source = source
        self._sizes = dict(source.shape.sizes())
        outside = (["embedding.weight"], ["norm.weight"], ["output.weight"])
        self.embedding, self.norm, self.output = self._load(*outside)
        self.layers = [self._layer(number) for number in range(source.shape.layers)]
        rotation = Rotation(source.shape, device)
        self._cos, self._sin = rotation.cos.to(dtype), rotation.sin.to(dtype)

    def cache(self, rows: int) -> Cache:
        return Cache(self.shape, rows, self.dtype, self.device)

    @torch.inference_mode()
    def read(self, prompts: Sequence[Tensor], cache: Cache) -> Tensor:
        """Take whole prompts [tokens] into an empty cache; the logits [rows, vocabulary] after each.

        InputError for one without tokens, or with more than the model has positions.
        """
        spans = [len(prompt) for prompt in prompts]
        for row, span in enumerate(spans):
            if not 0 < span <= self.shape.max_seq:
                raise InputError(
                    f"prompt {row + 1} has {span:,} tokens", where="prompts",
                    why=f"the model takes from 1 to {self.shape.max_seq:,}", next="Shorten it.",
                )  # fmt: skip
        assert cache.longest == 0 and len(spans) == len(cache.lengths), (spans, cache.lengths)
        cache.reserve(max(spans))
        positions = torch.cat([torch.arange(span) for span in spans]).to(self.device)
        tokens = torch.cat(list(prompts)).to(self.device)

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts, begin = [], 0
            for row, span in enumerate(spans):
                own = slice(begin, begin + span)
                cache.keys[number, row, :, :span] = k[own].transpose(0, 1)
                cache.values[number, row, :, :span] = v[own].transpose(0, 1)
                parts.append(_causal(q[own], k[own], v[own]))
                begin += span
            return torch.cat(parts)

        x = self._forward(tokens, positions, attend)
        cache.lengths += torch.tensor(spans, device=self.device)
        cache.longest = max(spans)
        return self._logits(x[torch.tensor(spans, device=self.device).cumsum(0) - 1])

    @torch.inference_mode()
    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """One more token of each row [rows]; the logits [rows, vocabulary] after it."""
        rows = len(tokens)
        assert rows == len(cache.lengths) and cache.longest < self.shape.max_seq, (rows, cache.longest)
        length = cache.longest + 1
        cache.reserve(length)
        positions, every = cache.lengths.clone(), torch.arange(rows, device=self.device)
        mask = None
        if rows > 1:
            seen = torch.arange(length, device=self.device) <= positions.unsqueeze(1)
            mask = seen.view(rows, 1, 1, length)

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[number], cache.values[number]
            if rows == 1:
                keys[0, :, length - 1], values[0, :, length - 1] = k[0], v[0]
            else:
                keys[every, :, positions], values[every, :, positions] = k, v
            shared = q.view(rows, self.shape.kv_heads, -1, self.shape.head_dim)
            return F.scaled_dot_product_attention(
                shared, keys[:, :, :length], values[:, :, :length], attn_mask=mask
            )

        x = self._forward(tokens.to(self.device), positions, attend)
        cache.lengths += 1
        cache.longest = length
        return self._logits(x)

    def _forward(self, tokens: Tensor, positions: Tensor, attend: _Attend) -> Tensor:
        shape = self.shape
        cos, sin = self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)
        heads = [shape.heads + shape.kv_heads, shape.kv_heads]
        x = F.embedding(tokens, self.embedding)
        for number, layer in enumerate(self.layers):
            projected = _times(self._normed(x, layer.attention_norm), layer.qkv)
            rotating, v = torch.split(projected.view(len(x), -1, shape.head_dim), heads, dim=1)
            a, b = rotating.chunk(2, dim=-1)
            rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
            q, k = torch.split(rotated, [shape.heads, shape.kv_heads], dim=1)
            x = x + _times(attend(number, q, k, v).reshape(len(x), -1), layer.wo)
            gate, up = _times(self._normed(x, layer.ffn_norm), layer.gate_up).chunk(2, dim=1)
            x = x + _times(F.silu(gate).mul_(up), layer.down)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return _times(self._normed(x, self.norm), self.output).float()

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.shape.norm_eps)

    def _layer(self, number: int) -> _Layer:
        at = f"layers.{number}"
        return _Layer(
            *self._load(
                [f"{at}.attention_norm.weight"],
                [f"{at}.attention.{w}.weight" for w in ("wq", "wk", "wv")],
                [f"{at}.attention.wo.weight"],
                [f"{at}.ffn_norm.weight"],
                [f"{at}.feed_forward.{w}.weight" for w in ("w1", "w3")],
                [f"{at}.feed_forward.w2.weight"],
            )
        )

    def _load(self, *groups: Sequence[str]) -> list[Tensor]:
        """The parameters of each group stacked along their first dimension."""
        stacked, parts = [], []
        for names in groups:
            rows = [self._sizes[name][0] for name in names]
            stacked.append(torch.empty(sum(rows), *self._sizes[names[0]][1:], dtype=self.dtype))
            own = zip(names, torch.split(stacked[-1], rows), strict=True)
            parts += [Part(name, (0,) * part.dim(), part) for name, part in own]
        self._source.fill(parts)
        return [tensor.to(self.device) for tensor in stacked]


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in] times weight [out, in] transposed; for few rows oneDNN prepares for longer than it saves."""
    return F.linear(x, weight) if len(x) <= _FEW else multiply(x, weight)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    return out.squeeze(0).transpose(0, 1)
