"""Compiled, the element-wise parts compute the same. A compiler takes its time: this is no quick test."""

import shutil

import pytest
import torch

from keepstep.llama.kernels import PLAIN, Kernels


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler for the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_are_the_plain_ones(dtype: torch.dtype) -> None:
    generator, compiled = torch.Generator().manual_seed(1), Kernels.compiled()

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight, inverse = some(24, 32), some(32), PLAIN.inverse_rms(some(24, 32), 1e-5)
    heads, cos, sin, gate_up = some(24, 3, 8), some(24, 1, 4), some(24, 1, 4), some(24, 64)
    for name, arguments in {
        "inverse_rms": (x, 1e-5),
        "normed": (x, inverse, weight),
        "norm_backward": (some(24, 32), x, inverse, weight),
        "rotated": (heads, cos, sin, 1),
        "swiglu": (gate_up,),
        "swiglu_backward": (some(24, 32), gate_up),
    }.items():
        found, expected = getattr(compiled, name)(*arguments), getattr(PLAIN, name)(*arguments)
        # In bf16 the plain ones round after each operation, compiled ones at the end.
        atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (0.03, 0.02)
        torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)
