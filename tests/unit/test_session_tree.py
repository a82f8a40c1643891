"""A script's state as bytes and back."""

import math

import pytest
import torch

from keepstep.core.errors import InputError
from keepstep.session.tree import Packed, unpack


def there_and_back(state: object) -> object:
    packed = Packed.of(state)
    payload = memoryview(bytearray(packed.size))
    packed.copy_into(payload)
    step, found = unpack(packed.describe(7), payload)
    assert step == 7
    return found


def test_plain_values_come_back_as_they_were() -> None:
    state = {"a": [1, 2.5, None, True, "x"], "b": (1, (2,)), 3: {"$x": 4}, (5, 6): {}, "inf": math.inf}
    assert there_and_back(state) == state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, 5).mul(9).to(dtype), torch.ones(()).to(dtype), torch.empty(0, 2).to(dtype)]
    found = there_and_back({"t": tensors})
    assert isinstance(found, dict)
    for one, other in zip(found["t"], tensors, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)


def test_what_is_not_contiguous_is_copied_right() -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    found = there_and_back(tensor)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, tensor)


def test_an_optimizers_state_survives() -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    found = there_and_back({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert isinstance(found, dict)
    other = torch.optim.AdamW(torch.nn.Linear(4, 2).parameters(), lr=0.5)
    other.load_state_dict(found["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1
    mine, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert torch.equal(mine[0]["exp_avg"], theirs[0]["exp_avg"])


def test_what_cannot_be_kept_is_named() -> None:
    with pytest.raises(InputError, match=r"state\['model'\]\[1\] is a Linear"):
        Packed.of({"model": [1, torch.nn.Linear(1, 1)]})
