"""Products in float8 on a CPU: what is rounded, what is not, and that a model learns by them all the same."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from keepstep.core.errors import InputError
from keepstep.core.layout import Coordinates, Layout
from keepstep.llama.flat import FlatIndex, FlatState
from keepstep.llama.float8 import check_device, check_shape, multiply8
from keepstep.llama.initial import initialise
from keepstep.llama.kernels import quantised
from keepstep.llama.microbatch import Rotation, Sequences, micro_batches, targets_of
from keepstep.llama.model import Means, Stage
from keepstep.llama.shape import ModelShape

SHAPE = ModelShape(layers=2, dim=64, ffn_dim=96, heads=4, kv_heads=2, vocabulary=80, max_seq=64)
CPU = torch.device("cpu")


def drawn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_a_product_is_that_of_the_rounded_factors() -> None:
    x, weight = drawn(40, 128, seed=1), drawn(32, 128, seed=2)
    x[3] *= 2.0**20  # a row of its own scale
    (rows, row_scales), (columns, column_scales) = quantised(x), quantised(weight)
    assert rows.dtype == torch.float8_e4m3fn and rows.float().abs().amax() <= 448
    rounded = (rows.float() * row_scales) @ (columns.float() * column_scales).t()
    found = multiply8(x, weight, quantised).float()
    torch.testing.assert_close(found, rounded, rtol=1e-2, atol=1e-2)
    exact = x.float() @ weight.float().t()
    error = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.min()) > 0.01 and float(error.max()) < 0.06, "of every row alike"
    backward = multiply8(found.bfloat16(), weight.t(), quantised)
    assert backward.shape == x.shape


def loss_and_gradients(state: FlatState, *, float8: bool) -> tuple[float, Tensor]:
    stage = Stage(SHAPE, state, Means(float8=float8))
    tokens = torch.randint(SHAPE.vocabulary, (2, 33), generator=torch.Generator().manual_seed(7))
    positions = torch.arange(32).expand(2, 32)
    data = Sequences(tokens, torch.zeros(2, 32, dtype=torch.int32), positions)
    (batch,) = micro_batches(
        data, targets_of(data), size=2, scale=1 / 64, rotation=Rotation(SHAPE, CPU), dtype=torch.bfloat16
    )
    state.grads.zero_()
    loss = stage(batch.tokens, batch=batch)
    torch.autograd.backward(loss)
    return loss.item(), state.grads.clone()


def fresh() -> FlatState:
    index = FlatIndex.of(SHAPE, Layout(), Coordinates(dp=0, pp=0, cp=0, tp=0))
    state = FlatState(index, 0, device=CPU, dtype=torch.bfloat16)
    initialise(state, SHAPE, seed=3)
    state.weights.copy_(state.master)
    return state


def test_gradients_point_where_those_of_bf16_do() -> None:
    state = fresh()
    plain_loss, plain = loss_and_gradients(state, float8=False)
    loss, rounded = loss_and_gradients(state, float8=True)
    assert 0.0 < abs(loss - plain_loss) < 0.02
    for parameter in state.index.parameters:
        span = slice(parameter.offset, parameter.offset + parameter.numel)
        cosine = torch.cosine_similarity(plain[span], rounded[span], dim=0)
        assert cosine > 0.98, parameter.name


def test_a_model_learns_as_much_as_in_bf16() -> None:
    ends = []
    for float8 in (False, True):
        state = fresh()
        losses = []
        for _ in range(20):
            loss, gradients = loss_and_gradients(state, float8=float8)
            losses.append(loss)
            state.master.sub_(gradients, alpha=0.1)
            state.weights.copy_(state.master)
        assert losses[-1] < losses[0] - 2.0
        ends.append(losses[-1])
    assert ends[0] != ends[1] and abs(ends[0] - ends[1]) < 0.1


def test_what_cannot_be_computed_so_is_refused() -> None:
    with pytest.raises(InputError, match="a CPU"):
        check_device(CPU)
    check_shape(SHAPE, Layout(tp=2), "auto")
    for shape, layout, precision in (
        (SHAPE, Layout(tp=4), "bf16"),
        (replace(SHAPE, ffn_dim=100), Layout(), "bf16"),
        (SHAPE, Layout(), "fp32"),
    ):
        with pytest.raises(InputError, match=r"numerics\.float8"):
            check_shape(shape, layout, precision)
