"""The memory of a rank by part, beside what its buffers take: they are built on the meta device."""

from dataclasses import replace

import pytest
import torch

from keepstep.llama.flat import FlatIndex, FlatState
from keepstep.llama.job import TrainJob
from keepstep.llama.numerics import Numerics
from keepstep.llama.optimizer import Gradients
from keepstep.llama.parallel import Groups
from keepstep.llama.schedule import Pipeline
from keepstep.session import current
from keepstep.spec.presets import PRESETS
from llama_footprint import footprint

META = torch.device("meta")
GB = 1e9


def job(preset: str, sizes: dict[str, int], seq: int, sequences: int) -> TrainJob:
    shape = PRESETS[preset].shape
    names = ("layers", "dim", "ffn_dim", "heads", "kv_heads", "vocabulary")
    model = {name: getattr(shape, name) for name in names}
    return TrainJob.parse(
        {
            "job": "x", "layout": sizes, "model": {**model, "max_seq": seq}, "steps": 1,
            "batch": {"global_tokens": seq * sequences, "seq": seq},
        }
    )  # fmt: skip


PAPER = {"tp": 8, "pp": 16, "dp": 128}  # 16,384 GPUs: table 4, second row


@pytest.mark.parametrize(
    ("preset", "sizes", "rank"),
    [("405b", PAPER, 0), ("405b", PAPER, 16_383), ("405b", {"tp": 8, "cp": 16, "pp": 16, "dp": 8}, 0),
     ("70b", {"tp": 8, "pp": 4, "dp": 2}, 9), ("8b", {"dp": 1}, 0)],
)  # fmt: skip
def test_buffers_are_as_large_as_the_formula_says(preset: str, sizes: dict[str, int], rank: int) -> None:
    one = job(preset, sizes, 8192, 2048)
    at = one.layout.coordinates(rank)
    index = FlatIndex.of(one.shape, one.layout, at, replicas=one.replicas)
    state = FlatState(index, at.dp, device=META, dtype=torch.bfloat16)
    gradients = Gradients(state, Groups(layout=one.layout, rank=rank), current())
    found = footprint(one, rank)
    assert found.weights == state.weights.nbytes
    assert found.gradients == state.grads.nbytes
    assert found.owned == state.state.nbytes
    exchanged = gradients.received.nbytes
    exchanged += sum(x.nbytes for x in (gradients.segment, gradients.owned) if x is not state.grads)
    assert found.exchanged == exchanged


def test_rank_0_of_the_paper_s_run_fits_into_a_gpu_of_80_gb_if_cheap_parts_are_made_again() -> None:
    one = job("405b", PAPER, 8192, 2048)
    kept = footprint(one, 0)
    again = footprint(replace(one, numerics=Numerics(recompute="selective")), 0)
    assert kept.total > 80 * GB > again.total
    assert again.weights / GB == pytest.approx(6.1, abs=0.1)  # 7 layers and the embedding, over 8 ranks
    assert again.gradients == 2 * again.weights
    assert again.activations == pytest.approx(7 * 16 * 0.357 * GB, rel=0.01)  # layers x micro-batches


def test_more_chunks_hold_more_and_gpipe_everything() -> None:
    one = job("8b", {"pp": 4}, 8192, 16)
    held = [
        footprint(replace(one, pipeline=Pipeline(schedule=schedule, chunks=chunks)), 0).activations
        for schedule, chunks in (("1f1b", 1), ("interleaved", 2), ("gpipe", 1))
    ]
    assert held == sorted(held)
    assert held[2] == 4 * held[0], "sixteen micro-batches against four"


def test_the_last_rank_alone_has_logits() -> None:
    one = job("8b", {"pp": 2, "tp": 2}, 8192, 4)
    ranks = [footprint(one, int(one.layout.rank(pp=pp))) for pp in range(2)]
    assert [found.logits > 0 for found in ranks] == [False, True]
    assert ranks[1].logits == 2092 * 64_128 * 6
