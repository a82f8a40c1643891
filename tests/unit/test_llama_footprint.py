"""The memory of a rank by part, beside its buffers on the meta device and the tensors of a real step."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from keepstep.core.footprint import Footprint, footprint, fullest
from keepstep.core.footprint import _held as under_way
from keepstep.core.job import LlamaRun
from keepstep.llama.data import Batch
from keepstep.llama.flat import FlatIndex, FlatState
from keepstep.llama.job import TrainJob
from keepstep.llama.numerics import RECOMPUTATIONS, SHARDS, Numerics
from keepstep.llama.parallel import Groups
from keepstep.llama.schedule import Pipeline
from keepstep.llama.sharding import Gradients
from keepstep.llama.trainer import Trainer
from keepstep.session import current
from keepstep.spec import load
from keepstep.spec.memory import rank_memory
from keepstep.spec.presets import PRESETS
from live_tensors import LiveTensors

META = torch.device("meta")
GB = 1e9


def job(preset: str, sizes: dict[str, int], seq: int, sequences: int, **more: Any) -> TrainJob:
    shape = PRESETS[preset].shape
    names = ("layers", "dim", "ffn_dim", "heads", "kv_heads", "vocabulary")
    model = {name: getattr(shape, name) for name in names}
    return TrainJob.parse(
        {
            "job": "x", "layout": sizes, "model": {**model, "max_seq": seq}, "steps": 1,
            "batch": {"global_tokens": seq * sequences, "seq": seq}, **more,
        }
    )  # fmt: skip


def taken(one: TrainJob, rank: int = 0, *, cuda: bool = True) -> Footprint:
    return footprint(one.shape, one.layout, rank, one.training(element=2, cuda=cuda))


PAPER = {"tp": 8, "pp": 16, "dp": 128}  # 16,384 GPUs: table 4, second row


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize(
    ("preset", "sizes", "rank", "more"),
    [
        ("405b", PAPER, 0, {}),
        ("405b", {"tp": 8, "cp": 16, "pp": 16, "dp": 8}, 16_383, {}),
        ("70b", {"tp": 8, "pp": 4, "dp": 2}, 9, {"virtual_dp": 4}),
        ("70b", {"pp": 2, "dp": 2}, 1, {"pipeline": {"schedule": "interleaved", "chunks": 3}}),
        ("8b", {"cp": 2}, 1, {}),
        ("8b", {}, 0, {}),
    ],
)  # fmt: skip
def test_buffers_are_as_large_as_the_formula_says(
    preset: str, sizes: dict[str, int], rank: int, more: dict[str, Any], shard: str
) -> None:
    one = job(preset, sizes, 8192, 2048, numerics={"shard": shard}, **more)
    at, chunks = one.layout.coordinates(rank), one.pipeline.chunks
    index = FlatIndex.of(one.shape, one.layout, at, replicas=one.replicas, chunks=chunks, shard=shard)
    state = FlatState(index, at.dp, device=META, dtype=torch.bfloat16, shard=shard)
    gradients = Gradients(state, Groups(layout=one.layout, rank=rank), current())
    found = taken(one, rank, cuda=False)
    assert found.weights == state.weights.nbytes
    assert found.gradients == state.grads.nbytes
    assert found.owned == state.state.nbytes
    exchanged = {x.data_ptr if x is state.grads else id(x): x for x in (gradients.segment, gradients.owned)}
    buffers = [x for x in exchanged.values() if x is not state.grads] + [gradients.received]
    assert found.exchanged == sum(x.nbytes for x in buffers)


class Noise:
    """One document a sequence."""

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        shape = (stop - start, 256)
        tokens = np.random.default_rng([step, start]).integers(0, 512, (shape[0], shape[1] + 1))
        return Batch(tokens, np.zeros(shape, np.int32), np.tile(np.arange(256), (shape[0], 1)))


@pytest.mark.parametrize("recompute", RECOMPUTATIONS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_takes_beside_its_buffers_what_the_formula_says(recompute: str, precision: str) -> None:
    """Every tensor that lives at the same time, in a real step; buffers that live longer are not counted."""
    model = {"layers": 4, "dim": 128, "ffn_dim": 384, "heads": 4, "kv_heads": 2, "vocabulary": 512}
    one = TrainJob.parse(
        {
            "job": "x", "layout": {}, "model": {**model, "max_seq": 256}, "steps": 2,
            "batch": {"global_tokens": 1024, "seq": 256, "micro_batch": 2},
            "numerics": {"recompute": recompute, "precision": precision, "shard": "parameters"},
        }
    )  # fmt: skip
    trainer = Trainer(
        one, Groups(layout=one.layout, rank=0), Noise(), device=torch.device("cpu"), session=current()
    )
    torch.nn.init.normal_(trainer.state.master, std=0.02)
    held, found = trainer.held(), trainer.expected()
    assert replace(found, activations=0, edges=0, working=0, logits=0) == held
    with LiveTensors() as live:
        trainer.step()
    assert live.most == pytest.approx(found.activations + max(found.working, found.logits), rel=0.04)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 7, 16])
@pytest.mark.parametrize(
    "pipeline", [Pipeline(), Pipeline(schedule="gpipe", chunks=2), Pipeline(schedule="interleaved", chunks=2)]
)
def test_as_many_micro_batches_are_under_way_as_their_schedule_says(
    pipeline: Pipeline, micro_batches: int
) -> None:
    one = job("debug", {"pp": 4 // pipeline.chunks}, 8, micro_batches)
    one = replace(one, pipeline=pipeline)
    for rank in range(one.layout.pp):
        now = most = 0
        for each in pipeline.passes(one.layout.pp, rank, micro_batches):
            now += -1 if each.backward else 1
            most = max(most, now)
        assert len(under_way(one.training(element=2, cuda=True), one.layout.pp, rank, micro_batches)) == most


def test_rank_0_of_the_paper_s_run_fits_into_a_gpu_of_80_gb_if_cheap_parts_are_made_again() -> None:
    one = job("405b", PAPER, 8192, 2048)
    kept, again = taken(one), taken(replace(one, numerics=Numerics(recompute="selective")))
    assert kept.total > 80 * GB > again.total
    assert again.weights / GB == pytest.approx(6.1, abs=0.1)  # 7 layers and the embedding, over 8 ranks
    assert again.gradients == 2 * again.weights
    assert again.activations == pytest.approx(7 * 16 * 0.357 * GB, rel=0.06)  # layers x micro-batches
    sharded = taken(replace(one, numerics=Numerics(recompute="selective", shard="gradients")))
    assert again.gradients / sharded.gradients == pytest.approx(7.7, abs=0.1), "a layer at a time"
    assert sharded.total < again.total - 10 * GB


def test_what_is_sharded_more_takes_less() -> None:
    """8b over 8 GPUs: 16 GB of weights are a window of two units."""
    found = [taken(job("8b", {"dp": 8}, 8192, 16, numerics={"shard": shard})) for shard in SHARDS]
    totals = [one.total for one in found]
    assert totals == sorted(totals, reverse=True)
    assert [one.weights / GB for one in found] == pytest.approx([16.06, 16.06, 2.1], abs=0.05)
    assert [one.gradients / GB for one in found] == pytest.approx([32.1, 2.1, 2.1], abs=0.05)


def test_a_spec_foretells_what_its_ranks_hold() -> None:
    text = """
        resources: {nodes: 2, gpus_per_node: 8}
        parallelism: {tp: 2, pp: 2, dp: 4}
        run:
          llama:
            model: 8b
            batch: {global_tokens: 524288, seq: 8192}
            numerics: {shard: gradients, recompute: selective}
        """
    spec = load(text)
    assert isinstance(spec.run, LlamaRun)
    numerics = {"shard": "gradients", "recompute": "selective"}
    for dp in (4, 2):
        described = job("8b", {"tp": 2, "pp": 2, "dp": dp}, 8192, 64, numerics=numerics, virtual_dp=4)
        _, expected = fullest(described.shape, described.layout, described.training(element=2, cuda=True))
        assert rank_memory(spec.run, described.layout, replicas=4) == expected


def test_the_fullest_rank_is_found() -> None:
    one = job("8b", {"pp": 4}, 8192, 16)
    rank, found = fullest(one.shape, one.layout, one.training(element=2, cuda=True))
    assert rank == 0, "it holds most micro-batches"
    assert all(found.total >= taken(one, other).total for other in range(4))
    assert str(found).startswith(f"{found.total / GB:.3g} GB: weights ")


def test_a_stage_has_messages_under_way() -> None:
    """Two a rank of the pipeline that were sent, and two to come, of 8,192 x 4,096 in bf16."""
    one = job("8b", {"pp": 4}, 8192, 16)
    assert taken(one).edges == 10 * 8192 * 4096 * 2
    assert taken(job("8b", {}, 8192, 16)).edges == 0


def test_the_last_rank_alone_has_logits() -> None:
    one = job("8b", {"pp": 2, "tp": 2}, 8192, 4)
    ranks = [taken(one, int(one.layout.rank(pp=pp))) for pp in range(2)]
    assert [found.logits > 0 for found in ranks] == [False, True]
    assert ranks[1].logits == 2092 * 64_128 * (2 + 4 + 4), "themselves, in fp32, their exponentials"
