"""The shape of a Llama 3 model: its sizes, its parameters by name, and what a token costs.

Everything here is arithmetic; torch is not imported. Names of parameters are canonical: they depend neither
on the pipeline stage nor on the tensor shard, so that a checkpoint of one layout fits every other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's rotary frequencies, for sequences longer than those that most of the training saw.

    A wave that turns at least `high_freq_factor` times within the original length keeps its frequency; one
    that turns at most `low_freq_factor` times is slower by `factor`; between them it is interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of the architecture of "The Llama 3 Herd of Models", table 3. Embeddings are not tied."""

    layers: int
    dim: int
    ffn_dim: int
    heads: int
    kv_heads: int
    vocabulary: int
    max_seq: int  # tokens; positions beyond it have no rotation
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    rope_scaling: RopeScaling | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ModelShape":
        """From JSON, of a job or a checkpoint; what is no size is passed over."""
        known = {field.name for field in fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        if scaling := kept.get("rope_scaling"):
            kept["rope_scaling"] = RopeScaling(**scaling)
        return cls(**kept)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def sizes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every parameter's canonical name and shape (out, in), in the order of the forward pass."""
        yield "embedding.weight", (self.vocabulary, self.dim)
        for layer in range(self.layers):
            yield from self.layer_sizes(layer)
        yield "norm.weight", (self.dim,)
        yield "output.weight", (self.vocabulary, self.dim)

    def layer_sizes(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """wq, wk, wv and w1, w3 are neighbours: in a flat buffer each of the two groups is one matrix."""
        kv_dim = self.kv_heads * self.head_dim
        at = f"layers.{layer}"
        yield f"{at}.attention_norm.weight", (self.dim,)
        yield f"{at}.attention.wq.weight", (self.dim, self.dim)
        yield f"{at}.attention.wk.weight", (kv_dim, self.dim)
        yield f"{at}.attention.wv.weight", (kv_dim, self.dim)
        yield f"{at}.attention.wo.weight", (self.dim, self.dim)
        yield f"{at}.ffn_norm.weight", (self.dim,)
        yield f"{at}.feed_forward.w1.weight", (self.ffn_dim, self.dim)  # gate
        yield f"{at}.feed_forward.w3.weight", (self.ffn_dim, self.dim)  # up
        yield f"{at}.feed_forward.w2.weight", (self.dim, self.ffn_dim)  # down

    def parameters(self) -> int:
        per_layer = sum(_numel(size) for _, size in self.layer_sizes(0))
        return self.layers * per_layer + self.dim + 2 * self.embedding_parameters()

    def embedding_parameters(self) -> int:
        return self.vocabulary * self.dim

    def flops_per_token(self, seq: int) -> float:
        """Of forward and backward: 6 (N - N_embedding) + 12 L D S.

        The convention of PaLM and torchtitan: the causal half of attention is not credited, nor is
        recomputation. MFU is this times tokens per second, over the GPUs' peak.
        """
        matrices = self.parameters() - self.embedding_parameters()
        return 6.0 * matrices + 12.0 * self.layers * self.dim * seq


def _numel(size: tuple[int, ...]) -> int:
    count = 1
    for length in size:
        count *= length
    return count
