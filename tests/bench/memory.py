"""The memory of a rank by part, as it is, beside the formula of `keepstep.core.footprint`.

    .venv/bin/python tests/bench/memory.py

Nothing of the size of these models is allocated here. Buffers of rank 0 of the 405B run (TP 8, PP 16, DP 128)
are built on the meta device by the trainer's own classes. Of one layer of 8b and of 405b at 8,192 tokens the
forward and the backward pass are run on fake tensors in bf16, and every storage is counted while it lives, as
an allocator would; communication is a buffer of the right size. What a rank holds of all its layers and
micro-batches is that of one, times as many as its schedule has under way: arithmetic, and not measured. Real
is a step of a small model on this CPU, with all of its tensors. The last line is one JSON object;
`_vs_formula` is what was found over what was predicted.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from keepstep.core.footprint import Footprint, activation_bytes, footprint
from keepstep.core.layout import Layout
from keepstep.llama.data import Batch
from keepstep.llama.flat import FlatIndex, FlatState
from keepstep.llama.initial import initialise
from keepstep.llama.job import TrainJob
from keepstep.llama.microbatch import MicroBatch
from keepstep.llama.model import Means, Stage
from keepstep.llama.numerics import RECOMPUTATIONS, SHARDS
from keepstep.llama.parallel import Groups
from keepstep.llama.shape import ModelShape
from keepstep.llama.sharding import Gradients
from keepstep.llama.tensor_parallel import Peers
from keepstep.llama.trainer import Trainer
from keepstep.session import current
from keepstep.spec.presets import PRESETS
from live_tensors import LiveTensors

SEQ = 8192
PAPER = {"tp": 8, "pp": 16, "dp": 128}
SMALL = {"layers": 4, "dim": 256, "ffn_dim": 768, "heads": 8, "kv_heads": 4, "vocabulary": 512}
GB = 1e9


class Absent(Peers):
    """Ranks that are not there: what is gathered or scattered has its size, and no content."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def gather(self, x: Tensor) -> Tensor:
        return x.new_empty(self.size * x.shape[0], *x.shape[1:])

    def scatter_sum(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0] // self.size, *x.shape[1:])


def job_of(preset: str, layout: dict[str, int], sequences: int, **numerics: str) -> TrainJob:
    shape = PRESETS[preset].shape
    return TrainJob.parse(
        {
            "job": "x", "layout": layout, "steps": 1, "numerics": numerics,
            "model": {**{name: getattr(shape, name) for name in SMALL}, "max_seq": SEQ},
            "batch": {"global_tokens": SEQ * sequences, "seq": SEQ},
        }
    )  # fmt: skip


def predicted(job: TrainJob) -> Footprint:
    return footprint(job.shape, job.layout, 0, job.training(element=2, cuda=True))


def buffers(job: TrainJob) -> dict[str, int]:
    """Of rank 0, on the meta device."""
    shard, layout = job.numerics.shard, job.layout
    index = FlatIndex.of(job.shape, layout, layout.coordinates(0), replicas=job.replicas, shard=shard)
    state = FlatState(index, 0, device=torch.device("meta"), dtype=torch.bfloat16, shard=shard, ahead=True)
    gradients = Gradients(state, Groups(layout=layout, rank=0), current())
    return {
        "weights": state.weights.nbytes, "gradients": state.grads.nbytes, "owned": state.state.nbytes,
        "exchanged": gradients.owned.nbytes,  # NCCL adds: nothing else is kept
    }  # fmt: skip


def layer(shape: ModelShape, recompute: str, tp: int = 1) -> tuple[int, int]:
    """Bytes that a layer holds between its passes, and that live at the same time at most."""
    one = replace(shape, layers=1, vocabulary=8 * tp)
    layout = Layout(tp=tp)
    with FakeTensorMode():
        index = FlatIndex.of(one, layout, layout.coordinates(0))
        state = FlatState(index, 0, device=torch.device("cpu"), dtype=torch.bfloat16)
        means = Means(tp=Absent(tp) if tp > 1 else Peers(), recompute=recompute)
        block = Stage(one, state, means).layers[0]
        table = torch.empty(SEQ, 1, shape.head_dim // 2, dtype=torch.bfloat16)
        batch = MicroBatch(tokens=torch.empty(0), targets=None, scale=1.0, cos=table, sin=table, spans=(SEQ,))
        x = torch.empty(SEQ // tp, shape.dim, dtype=torch.bfloat16, requires_grad=True)
        with LiveTensors() as live:
            y = block(x, batch)
            held = x.nbytes + live.now - y.nbytes  # the result is the next layer's input
            torch.autograd.backward(y, torch.empty_like(y))
            return held, live.most


class Noise:
    def sequences(self, step: int, start: int, stop: int) -> Batch:
        count, seq = stop - start, 512
        tokens = np.random.default_rng([step, start]).integers(0, SMALL["vocabulary"], (count, seq + 1))
        return Batch(tokens, np.zeros((count, seq), np.int32), np.tile(np.arange(seq), (count, 1)))


def real_step(recompute: str) -> tuple[int, int]:
    """Bytes beside its buffers that live in a step of the small model at most, and as predicted."""
    job = TrainJob.parse(
        {
            "job": "x", "layout": {}, "model": {**SMALL, "max_seq": 512}, "steps": 2,
            "batch": {"global_tokens": 2048, "seq": 512, "micro_batch": 2},
            "numerics": {"precision": "bf16", "recompute": recompute},
        }
    )  # fmt: skip
    trainer = Trainer(
        job, Groups(layout=job.layout, rank=0), Noise(), device=torch.device("cpu"), session=current()
    )
    initialise(trainer.state, job.shape, seed=0)
    trainer.optimizer.publish()
    with LiveTensors() as live:
        trainer.step()
    expected = trainer.expected()
    return live.most, expected.activations + max(expected.working, expected.logits)


def main() -> None:
    figures: dict[str, float] = {}
    for shard in SHARDS:
        job = job_of("405b", PAPER, 2048, shard=shard, recompute="selective")
        said, there = predicted(job), buffers(job)
        print(f"405b rank 0, shard {shard}, recompute selective: {said}")
        for name, size in there.items():
            figures[f"405b_{shard}_{name}_gb"] = size / GB
        wanted = said.weights + said.gradients + said.owned + said.exchanged
        figures[f"405b_{shard}_buffers_vs_formula"] = sum(there.values()) / wanted
        figures[f"405b_{shard}_total_gb"] = said.total / GB
    for preset, tp in (("8b", 1), ("405b", 8)):
        shape = job_of(preset, {"tp": tp}, 1).shape
        for recompute in RECOMPUTATIONS:
            held, most = layer(shape, recompute, tp)
            expected = activation_bytes(shape, SEQ, recompute, tp=tp)
            print(
                f"a layer of {preset}, tp {tp}, recompute {recompute}: holds {held / GB:.3f} GB "
                f"(formula {expected / GB:.3f}), at most {most / GB:.3f} in its backward pass"
            )
            figures[f"{preset}_layer_{recompute}_gb"] = held / GB
            figures[f"{preset}_layer_{recompute}_vs_formula"] = held / expected
            figures[f"{preset}_layer_{recompute}_peak_gb"] = most / GB
    for recompute in RECOMPUTATIONS:
        rank = predicted(job_of("405b", PAPER, 2048, recompute=recompute))
        figures[f"405b_rank0_{recompute}_activations_gb"] = rank.activations / GB
    for recompute in RECOMPUTATIONS:
        most, expected_bytes = real_step(recompute)
        figures[f"real_step_{recompute}_mb"] = most / 1e6
        figures[f"real_step_{recompute}_vs_formula"] = most / expected_bytes
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    print(json.dumps({"bench": "memory", "figures": rounded, "context": {"torch": torch.__version__}}))


if __name__ == "__main__":
    main()
