"""In which precision a job computes, what it computes twice or shards to save memory, and what is compiled.

Whatever is chosen, master weights, moments, sums of gradients, norms and the loss are fp32.
"""

from dataclasses import dataclass

PRECISIONS = ("auto", "bf16", "fp32")
RECOMPUTATIONS = ("none", "selective", "full")
SHARDS = ("optimizer", "gradients", "parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    precision: str = "auto"  # of weights and activations while computing; auto: bf16 on CUDA, fp32 elsewhere
    recompute: str = "none"
    shard: str = "optimizer"  # what ranks of DP x CP share out: see sharding.py
    compile: bool = False  # the element-wise parts of each block, by torch.compile
    float8: bool = False  # products of the layers' matrices: see float8.py
    deterministic: bool = False  # the same bits in every run of one layout; on CPU it is always so


PLAIN = Numerics()
