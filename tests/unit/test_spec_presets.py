"""The figures of the paper, and of the models that people name."""

from dataclasses import replace

import pytest

from keepstep.core.job import ModelShape, RopeScaling
from keepstep.spec import PRESETS


# Table 3 of arXiv 2407.21783; parameters counted from the shapes.
@pytest.mark.parametrize(
    ("name", "layers", "dim", "ffn_dim", "heads", "lr", "parameters"),
    [
        ("8b", 32, 4096, 14_336, 32, 3e-4, 8.030e9),
        ("70b", 80, 8192, 28_672, 64, 1.5e-4, 70.554e9),
        ("405b", 126, 16_384, 53_248, 128, 8e-5, 405.853e9),
    ],
)
def test_the_papers_models(
    name: str, layers: int, dim: int, ffn_dim: int, heads: int, lr: float, parameters: float
) -> None:
    preset = PRESETS[name]
    shape = preset.shape
    assert (shape.layers, shape.dim, shape.ffn_dim, shape.heads) == (layers, dim, ffn_dim, heads)
    assert (shape.kv_heads, shape.vocabulary, shape.rope_theta) == (8, 128_256, 500_000)
    assert preset.lr == lr
    assert shape.parameters == pytest.approx(parameters, abs=0.0005e9)


@pytest.mark.parametrize(
    ("name", "seq", "flops"),
    [
        ("8b", 8192, 5.79e10), ("70b", 8192, 4.81e11), ("405b", 8192, 2.62e12),
        ("8b", 131_072, 2.51e11), ("70b", 131_072, 1.45e12), ("405b", 131_072, 5.67e12),
    ],
)  # fmt: skip
def test_flops_of_a_token(name: str, seq: int, flops: float) -> None:
    assert PRESETS[name].shape.flops_per_token(seq) == pytest.approx(flops, rel=0.005)


def test_the_1b_model_is_llama_3_2s_with_a_table_more() -> None:
    shape = PRESETS["1b"].shape
    assert shape.parameters - shape.embedding_parameters == 1_235_814_400
    assert shape.head_dim == 64


def test_llama_3_1_has_scaled_positions_and_more_of_them() -> None:
    for name in ("8b", "70b", "405b"):
        plain, scaled = PRESETS[name].shape, PRESETS[f"{name}-3.1"].shape
        assert scaled.rope_scaling == RopeScaling(factor=8.0)
        same = replace(scaled, preset=name, max_seq=plain.max_seq, rope_scaling=None)
        assert (same, scaled.max_seq) == (plain, 131_072)


def test_the_demo_model() -> None:
    shape = PRESETS["debug"].shape
    sizes = (shape.dim, shape.layers, shape.heads, shape.kv_heads, shape.ffn_dim, shape.vocabulary)
    assert sizes == (256, 4, 8, 4, 768, 260)
    assert 3.2e6 < shape.parameters < 3.4e6


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_hold_together(preset: object) -> None:
    from keepstep.spec import Preset
    from keepstep.spec.fit import model_problems

    assert isinstance(preset, Preset)
    assert not list(model_problems(preset.shape))
    assert preset.seq <= preset.shape.max_seq


def test_parameters_are_those_of_the_trainer() -> None:
    """Counted here by hand for one block: four projections, three matrices, two norms."""
    shape = ModelShape(dim=8, layers=1, heads=4, kv_heads=2, ffn_dim=16, vocabulary=10)
    block = 8 * 8 + 2 * (4 * 8) + 8 * 8 + 3 * (8 * 16) + 2 * 8
    assert shape.parameters == 10 * 8 + block + 8 + 10 * 8
