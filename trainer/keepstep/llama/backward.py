"""Backward passes that begin with a gradient from elsewhere: from the next stage, or of what is run again."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Fed(Function):
    """A number whose backward pass hands dy to y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dy: Tensor) -> Tensor:
        ctx.dy = dy
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.dy, None


def backward(y: Tensor, dy: Tensor) -> None:
    """torch.autograd.backward(y, dy), which imports SymPy to compare their shapes."""
    assert y.shape == dy.shape, (y.shape, dy.shape)
    torch.autograd.backward(_Fed.apply(y, dy))
