"""Shapes, flat buffers, initial weights and the update rule, in one process."""

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from keepstep.core.errors import InputError
from keepstep.core.layout import Layout
from keepstep.core.snapshots import Stamp
from keepstep.llama.flat import FlatIndex, FlatState
from keepstep.llama.initial import initialise
from keepstep.llama.job import TrainJob
from keepstep.llama.memory import load
from keepstep.llama.optimizer import OptimizerConfig, ShardedAdamW
from keepstep.llama.parallel import Groups
from keepstep.llama.shape import ModelShape

SMALL = ModelShape(layers=5, dim=32, ffn_dim=48, heads=4, kv_heads=2, vocabulary=36, max_seq=64)
CPU = torch.device("cpu")


def llama(layers: int, dim: int, ffn_dim: int, heads: int) -> ModelShape:
    return ModelShape(
        layers=layers, dim=dim, ffn_dim=ffn_dim, heads=heads, kv_heads=8, vocabulary=128_256, max_seq=131_072
    )


@pytest.mark.parametrize(
    ("shape", "parameters", "flops_8k", "flops_128k"),
    [
        (llama(32, 4_096, 14_336, 32), 8.030e9, 5.79e10, 2.51e11),
        (llama(80, 8_192, 28_672, 64), 70.554e9, 4.81e11, 1.45e12),
        (llama(126, 16_384, 53_248, 128), 405.853e9, 2.62e12, 5.67e12),
    ],
)
def test_sizes_and_costs_are_those_of_the_paper(
    shape: ModelShape, parameters: float, flops_8k: float, flops_128k: float
) -> None:
    assert shape.parameters() == pytest.approx(parameters, rel=1e-4)
    assert shape.flops_per_token(8_192) == pytest.approx(flops_8k, rel=4e-3)
    assert shape.flops_per_token(131_072) == pytest.approx(flops_128k, rel=4e-3)


def whole_model(layout: Layout, shard: str = "optimizer") -> dict[str, Tensor]:
    """The parameters, put together from the master weights of all ranks."""
    found: dict[str, Tensor] = {}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        index = FlatIndex.of(SMALL, layout, at, shard=shard)
        state = FlatState(index, at.dp, device=CPU, dtype=torch.float32)
        initialise(state, SMALL, seed=11)
        ranges = index.owned(at.dp)
        for parameter in index.parameters:
            unit, _ = index[parameter.name]
            owned, master = ranges[unit.number], state.master[index.local(unit)]
            whole = found.setdefault(parameter.name, torch.full(parameter.global_shape, math.nan))
            local = torch.full((parameter.numel,), math.nan)
            start, stop = max(owned.start, parameter.offset), min(owned.stop, parameter.span.stop)
            if start >= stop:
                continue
            part = master[start - owned.start : stop - owned.start]
            local[start - parameter.offset : stop - parameter.offset] = part
            view = whole
            if parameter.tp_dim is not None:
                size = parameter.shape[parameter.tp_dim]
                view = whole.narrow(parameter.tp_dim, parameter.tp_offset, size)
            view.copy_(torch.where(local.isnan(), view.reshape(-1), local).view(parameter.shape))
    return found


@pytest.mark.parametrize(
    "layout", [Layout(dp=2, pp=2, tp=2), Layout(dp=3), Layout(pp=5, tp=2), Layout(dp=8), Layout(dp=2, cp=3)]
)
@pytest.mark.parametrize("shard", ["optimizer", "parameters"])
def test_every_layout_begins_with_the_same_weights_each_owned_once(layout: Layout, shard: str) -> None:
    one, cut = whole_model(Layout()), whole_model(layout, shard)
    assert one.keys() == cut.keys() == {name for name, _ in SMALL.sizes()}
    for name, weight in one.items():
        assert torch.equal(weight, cut[name]), name


def test_other_seeds_begin_elsewhere() -> None:
    def weights(seed: int) -> Tensor:
        index = FlatIndex.of(SMALL, Layout(), Layout().coordinates(0))
        state = FlatState(index, 0, device=CPU, dtype=torch.float32)
        initialise(state, SMALL, seed=seed)
        return state.master

    assert not torch.equal(weights(0), weights(1))


def test_a_gang_that_shrinks_cuts_the_same_vector() -> None:
    layouts = [Layout(dp=dp, tp=2) for dp in (1, 2, 3, 6)]
    for shard, units in (("optimizer", 1), ("gradients", 7)):
        indices = [
            FlatIndex.of(SMALL, layout, layout.coordinates(0), replicas=6, shard=shard) for layout in layouts
        ]
        assert len({index.units for index in indices}) == 1
        for index in indices:
            assert len(index.units) == units, "the whole; layers, embedding and output"
            for unit in index.units:
                owned = [k for dp in range(index.dp) for k in index.owned(dp)[unit.number]]
                assert owned == list(range(unit.start, unit.stop))
                assert len(unit) // index.dp % 64 == 0


class Kept:
    """Slots of the ranks of a layout, as the session gives them."""

    def __init__(self, states: list[Tensor], rank: int) -> None:
        self.shape, self._states = SimpleNamespace(rank=rank), states

    def load(self, ranks: list[int], _world: int, _at: Stamp) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                payload=bytearray(self._states[rank].numpy().tobytes()), description=b'{"values": {}}'
            )
            for rank in ranks
        ]


@pytest.mark.parametrize("shard", ["optimizer", "parameters"])
@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4), (4, 1), (6, 3)])
def test_a_state_in_memory_is_that_of_fewer_or_more_replicas(old: int, new: int, shard: str) -> None:
    def states(dp: int) -> list[FlatState]:
        layout = Layout(dp=dp, cp=2)
        indices = [
            FlatIndex.of(SMALL, layout, layout.coordinates(rank), replicas=12, shard=shard)
            for rank in range(layout.world_size)
        ]
        return [
            FlatState(index, layout.coordinates(rank).dp, device=CPU, dtype=torch.float32, shard=shard)
            for rank, index in enumerate(indices)
        ]

    def places(state: FlatState) -> Tensor:
        """Of each element of the three parts a number of its own, by its place in the whole vector."""
        flat = torch.cat(
            [torch.arange(owned.start, owned.stop) for owned in state.index.owned(state.dp_rank)]
        )
        return torch.cat([flat + k * 100_000.0 for k in range(3)])

    before, after = states(old), states(new)
    job = TrainJob.parse(
        {
            "job": "x", "layout": {"dp": new, "cp": 2}, "virtual_dp": 12, "model": asdict(SMALL), "steps": 1,
            "batch": {"global_tokens": 12 * 64, "seq": 64}, "restore": {"step": 3, "attempt": 1},
            "memory": {"dp": old, "cp": 2},
        }
    )  # fmt: skip
    kept = [places(state) for state in before]
    for rank, state in enumerate(after):
        load(job, state, Kept(kept, rank), dp_rank=state.dp_rank)  # type: ignore[arg-type]
        assert torch.equal(state.state, places(state)), rank


def test_who_made_a_gradient_that_is_not_finite_knows_it_after_it_was_added() -> None:
    """And no update is made of it."""
    index = FlatIndex.of(SMALL, Layout(), Layout().coordinates(0), shard="parameters")
    state = FlatState(index, 0, device=CPU, dtype=torch.float32, shard="parameters")
    initialise(state, SMALL, seed=2)
    before = state.state.clone()
    optimizer = ShardedAdamW(state, Groups(layout=Layout(), rank=0), OptimizerConfig())
    gradients = optimizer.gradients
    for value in (0.5, math.inf):
        gradients.begin()
        for unit in index.units:
            state.grads.zero_()
            state.grads[7] = value if unit.number == 3 else 0.0
            gradients.collect(unit)
        assert gradients.finite_here() == math.isfinite(value)
        update = optimizer.update(torch.ones(1), lr=0.0)
        assert update.grad_norm == value
    assert torch.equal(state.master, before[: index.shard])
    assert float(state.exp_avg.abs().max()) == pytest.approx(0.05), "of the first update alone"


def test_what_does_not_fit_is_refused() -> None:
    for layout, replicas, what in (
        (Layout(tp=4), 1, "2 KV heads"),
        (Layout(pp=8), 1, "5 layers"),
        (Layout(dp=2), 3, "the 3 that were asked for"),
    ):
        with pytest.raises(InputError, match=what):
            FlatIndex.of(SMALL, layout, layout.coordinates(0), replicas=replicas)
    with pytest.raises(InputError, match="do not divide 4 heads"):
        FlatIndex.of(replace(SMALL, kv_heads=3), Layout(), Layout().coordinates(0))


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_an_update_is_that_of_torch(clip: float) -> None:
    """AdamW with decay on matrices only, after clipping to the global norm."""
    config = OptimizerConfig(lr=1e-2, clip=clip, weight_decay=0.3)
    index = FlatIndex.of(SMALL, Layout(), Layout().coordinates(0))
    state = FlatState(index, 0, device=CPU, dtype=torch.float32)
    initialise(state, SMALL, seed=2)
    ours = ShardedAdamW(state, Groups(layout=Layout(), rank=0), config)
    theirs = {p.name: state.weight(p.name).clone().requires_grad_() for p in index.parameters}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in theirs.items()}
    steps = {name: torch.tensor(0.0) for name in theirs}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        used = index.units[0].used
        state.grads[:used] = torch.randn(used, generator=generator) * 0.01
        for name, parameter in theirs.items():
            parameter.grad = state.grad(name).clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), clip or math.inf)
        with torch.no_grad():
            for name, parameter in theirs.items():
                clipped = parameter.grad
                assert clipped is not None
                # What torch.optim.AdamW calls. To make one of these imports the compiler, for seconds.
                adamw(
                    [parameter], [clipped], [moments[name][0]], [moments[name][1]], [], [steps[name]],
                    foreach=False, amsgrad=False, beta1=config.beta1, beta2=config.beta2, lr=1e-2,
                    weight_decay=0.3 if parameter.dim() == 2 else 0.0, eps=config.eps, maximize=False,
                )  # fmt: skip
        update = ours.update(torch.ones(1), lr=1e-2)
        assert update.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in theirs.items():
        torch.testing.assert_close(state.weight(name), parameter.detach(), atol=1e-6, rtol=1e-5)


def test_the_norm_of_a_large_gradient_is_exact_where_one_fp32_sum_is_not() -> None:
    """Else clipping scales each gradient by an error of its own, and training drifts from anybody else's."""
    shape = replace(SMALL, vocabulary=2**16)
    index = FlatIndex.of(shape, Layout(), Layout().coordinates(0))
    state = FlatState(index, 0, device=CPU, dtype=torch.float32)
    used = index.units[0].used
    state.grads[:used] = torch.randn(used, generator=torch.Generator().manual_seed(0))
    exact = float(torch.linalg.vector_norm(state.grads, dtype=torch.float64))
    optimizer = ShardedAdamW(state, Groups(layout=Layout(), rank=0), OptimizerConfig())
    update = optimizer.update(torch.ones(1), lr=1e-3)
    assert update.grad_norm == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("left_out", [False, True])
def test_an_update_that_would_do_harm_changes_nothing_but_is_told(left_out: bool) -> None:
    """A gradient that is not finite, and a batch that is to be left out."""
    index = FlatIndex.of(SMALL, Layout(), Layout().coordinates(0))
    state = FlatState(index, 0, device=CPU, dtype=torch.float32)
    initialise(state, SMALL, seed=2)
    before = state.state.clone()
    state.grads[5] = 0.5 if left_out else math.nan
    optimizer = ShardedAdamW(state, Groups(layout=Layout(), rank=0), OptimizerConfig())
    update = optimizer.update(torch.ones(1), lr=1.0, left_out=left_out)
    assert update.grad_norm == 0.5 if left_out else math.isnan(update.grad_norm)
    assert torch.equal(state.state, before)


def test_the_learning_rate_warms_up_and_falls_to_its_minimum() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [config.lr_at(step, 104) for step in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55)
    assert config.lr_at(104, 104) == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_the_learning_rate_is_annealed_to_nothing_in_a_line() -> None:
    """The cosine of a longer run is left where annealing begins, as the paper's 405B run did."""
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4, decay_steps=204, anneal_steps=10)
    rates = [config.lr_at(step, 104) for step in range(104)]
    longer = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    assert rates[:95] == [longer.lr_at(step, 204) for step in range(95)]
    assert rates[94:] == pytest.approx([rates[94] * (10 - k) / 10 for k in range(10)])
    assert config.lr_at(104, 104) == 0.0
    ended = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4, decay_steps=54)
    assert ended.lr_at(54, 104) == ended.lr_at(103, 104) == pytest.approx(0.1)
