"""Models by name.

8b, 70b and 405b are table 3 of "The Llama 3 Herd of Models" (arXiv 2407.21783), with the paper's peak
learning rates; 1b has the shape of Llama 3.2 1B, but an output table of its own (the built-in trainer ties
none), which makes it 1.498e9 parameters instead of 1.236e9. Names that end in 3.1 are the paper's models
after training on long sequences: rotary positions are scaled, and there are 131,072 of them. `debug` trains
on a CPU in seconds and reads bytes: 256 of them and four marks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from keepstep.core.job import ModelShape, RopeScaling

LLAMA_VOCABULARY = 128_256
BYTE_VOCABULARY = 260
USUAL_LR = 3e-4  # of a shape that is nobody's


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    shape: ModelShape
    lr: float  # at the peak
    seq: int  # of the first stage of training


def _bytes(name: str, *, dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, lr: float) -> Preset:
    shape = ModelShape(
        preset=name, dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, ffn_dim=ffn_dim,
        vocabulary=BYTE_VOCABULARY, max_seq=2048,
    )  # fmt: skip
    return Preset(shape=shape, lr=lr, seq=256)


def _scaled(preset: Preset) -> Preset:
    shape = replace(
        preset.shape, preset=f"{preset.shape.preset}-3.1", max_seq=131_072, rope_scaling=RopeScaling(factor=8)
    )
    return Preset(shape=shape, lr=preset.lr, seq=8192)


def _llama(name: str, *, dim: int, layers: int, heads: int, ffn_dim: int, lr: float, seq: int) -> Preset:
    shape = ModelShape(
        preset=name, dim=dim, layers=layers, heads=heads, kv_heads=8, ffn_dim=ffn_dim,
        vocabulary=LLAMA_VOCABULARY,
    )  # fmt: skip
    return Preset(shape=shape, lr=lr, seq=seq)


_PAPERS = (
    _llama("8b", dim=4096, layers=32, heads=32, ffn_dim=14_336, lr=3e-4, seq=8192),
    _llama("70b", dim=8192, layers=80, heads=64, ffn_dim=28_672, lr=1.5e-4, seq=8192),
    _llama("405b", dim=16_384, layers=126, heads=128, ffn_dim=53_248, lr=8e-5, seq=4096),
)
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.shape.preset: preset
        for preset in (
            _bytes("tiny", dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, lr=1e-3),
            _bytes("small", dim=64, layers=4, heads=8, kv_heads=4, ffn_dim=192, lr=1e-3),
            _bytes("debug", dim=256, layers=4, heads=8, kv_heads=4, ffn_dim=768, lr=1e-3),
            _llama("1b", dim=2048, layers=16, heads=32, ffn_dim=8192, lr=3e-4, seq=8192),
            *_PAPERS,
            *map(_scaled, _PAPERS),
        )
        if preset.shape.preset is not None
    }
)
