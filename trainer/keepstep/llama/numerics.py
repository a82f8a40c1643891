"""In which precision a job computes, what it computes twice to save memory, and what is compiled.

Whatever is chosen, master weights, moments, sums of gradients, norms and the loss are fp32.

Activations that a layer holds for its backward pass, in elements a token, for dim d, KV width k, FFN width f:

    none       4 d/tp + 2 d + 2 k/tp + 3 f/tp    everything
    selective  4 d/tp       + 2 k/tp + 2 f/tp    outputs of norms and SwiGLU are made again, no matrices
    full         d/tp                            the layer's input; the whole layer is run again

(d/tp each: inputs of both norms, queries, attention's output; d: the gathered inputs of the column matrices;
with context parallelism keys and values are those of all its ranks. Beside that a few fp32 numbers a token:
norms' scales, attention's sums.)
"""

from dataclasses import dataclass

from keepstep.llama.shape import ModelShape

PRECISIONS = ("auto", "bf16", "fp32")
RECOMPUTATIONS = ("none", "selective", "full")
SHARDS = ("optimizer", "gradients", "parameters")
LOGITS = 2**27  # that exist at a time: 512 MB in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    precision: str = "auto"  # of weights and activations while computing; auto: bf16 on CUDA, fp32 elsewhere
    recompute: str = "none"
    shard: str = "optimizer"  # what ranks of DP x CP share out: see sharding.py
    compile: bool = False  # the element-wise parts of each block, by torch.compile
    deterministic: bool = False  # the same bits in every run of one layout; on CPU it is always so


PLAIN = Numerics()


def activation_bytes(
    shape: ModelShape, tokens: int, recompute: str, *, tp: int = 1, cp: int = 1, element: int = 2
) -> float:
    """That one layer holds for one micro-batch of `tokens` tokens on this context parallel rank."""
    dim, kv, ffn = shape.dim, shape.kv_heads * shape.head_dim * cp, shape.ffn_dim
    if recompute == "full":
        return tokens * dim / tp * element
    matrices = (4 * dim + 2 * kv + 2 * ffn) / tp
    again = 2 * dim + ffn / tp
    scales = 4 * (2 + shape.heads) / tp
    return tokens * ((matrices + (again if recompute == "none" else 0.0)) * element + scales)
