"""Specs that several tests submit: small enough to step in a few hundredths of a second."""

TINY = """
name: tiny
resources: {nodes: 2, gpus_per_node: 2}
parallelism: {tp: 2, pp: 1, dp: 2}
elastic: {min_dp: 1}
run:
  llama:
    model: {dim: 32, layers: 2, heads: 4, kv_heads: 2, ffn_dim: 64, vocabulary: 260}
    data: {source: stdlib}
    steps: 60
    batch: {global_tokens: 512, seq: 64}
    optimizer: {lr: 0.001, min_lr: 0.001, warmup_steps: 5}  # the same at a step however many are asked for
checkpoint: {dir: ./checkpoints, every: 5 steps}
"""

CUBE = TINY.replace("nodes: 2, gpus_per_node: 2", "nodes: 2, gpus_per_node: 4").replace("pp: 1", "pp: 2")
