"""Meta's format in: computed as Meta computes it, read in any layout, verified."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu

from keepstep.core.errors import InputError
from keepstep.core.layout import Layout
from keepstep.llama.flat import FlatIndex, FlatState, tp_dim
from keepstep.llama.generation import Decoder
from keepstep.llama.shape import ModelShape, RopeScaling
from keepstep.llama.weights import config_of, hugging_face_name, init_from
from keepstep.llama.weights.__main__ import main
from keepstep.llama.weights.sources import open_source

SHAPE = ModelShape(
    layers=2, dim=24, ffn_dim=40, heads=4, kv_heads=2, vocabulary=64, max_seq=8192, rope_theta=1e5
)
PARAMS: dict[str, Any] = {
    "dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64, "multiple_of": 8,
    "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 1e5,
}  # fmt: skip


def theirs() -> dict[str, Tensor]:
    """Weights by Meta's names, in Meta's order of rotary pairs."""
    source = torch.Generator().manual_seed(5)
    named = {name.replace("embedding.", "tok_embeddings."): size for name, size in SHAPE.sizes()}
    return {name: 0.3 * torch.randn(size, generator=source) for name, size in named.items()}


def write(folder: Path, files: int, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(PARAMS | changed))
    for number in range(files):
        cut = {}
        for name, tensor in theirs().items():
            dim = tp_dim(name.replace("tok_embeddings.", "embedding."))
            cut[name] = tensor if dim is None else tensor.chunk(files, dim)[number].clone()
        cut["rope.freqs"] = torch.zeros(3)
        torch.save(cut, folder / f"consolidated.{number:02d}.pth")
    return folder


def reference_logits(tokens: Tensor) -> Tensor:
    """The model as its authors wrote it down: rotary pairs are complex numbers, neighbours in a head."""
    w, head = theirs(), SHAPE.head_dim
    frequencies = 1.0 / SHAPE.rope_theta ** (torch.arange(0, head, 2).float() / head)
    angles = torch.outer(torch.arange(len(tokens)).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    def normed(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + SHAPE.norm_eps) * w[name]

    x = w["tok_embeddings.weight"][tokens]
    ahead = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)
    for layer in range(SHAPE.layers):
        at = f"layers.{layer}"
        y = normed(x, f"{at}.attention_norm.weight")
        q, k, v = (
            (y @ w[f"{at}.attention.{name}.weight"].T).view(len(tokens), -1, head)
            for name in ("wq", "wk", "wv")
        )
        q, k = rotated(q), rotated(k)
        k, v = (part.repeat_interleave(SHAPE.heads // SHAPE.kv_heads, dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / head**0.5 + ahead
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[f"{at}.attention.wo.weight"].T
        y = normed(x, f"{at}.ffn_norm.weight")
        gate, up = (y @ w[f"{at}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (silu(gate) * up) @ w[f"{at}.feed_forward.w2.weight"].T
    return normed(x, "norm.weight") @ w["output.weight"].T


@pytest.mark.parametrize("files", [1, 2])
def test_logits_equal_the_model_as_it_was_written_down(tmp_path: Path, files: int) -> None:
    source = open_source(write(tmp_path / "meta", files))
    assert source.shape == SHAPE
    model = Decoder(source, dtype=torch.float32, device=torch.device("cpu"))
    tokens = torch.randint(0, 64, (23,), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(tokens)
    for length in (1, 9, 23):
        logits = model.read([tokens[:length]], model.cache(1))
        torch.testing.assert_close(logits[0], expected[length - 1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [Layout(tp=2, dp=3), Layout(pp=2, dp=2), Layout(tp=2, pp=2)], ids=str)
def test_every_rank_reads_its_own_whatever_the_files(tmp_path: Path, layout: Layout) -> None:
    """Two files read by any layout, against one file read whole."""
    one = open_source(write(tmp_path / "one", 1))
    two = write(tmp_path / "two", 2)
    index = FlatIndex.of(SHAPE, Layout(), Layout().coordinates(0))
    whole = FlatState(index, 0, device=torch.device("cpu"), dtype=torch.float32)
    init_from(tmp_path / "one", whole, SHAPE)
    assert one.shape == SHAPE
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        own = FlatIndex.of(SHAPE, layout, at)
        state = FlatState(own, at.dp, device=torch.device("cpu"), dtype=torch.float32)
        init_from(two, state, SHAPE)
        flat = torch.zeros(own.length)
        for p in own.parameters:
            tensor = whole.weight(p.name)
            if p.tp_dim is not None:
                tensor = tensor.narrow(p.tp_dim, p.tp_offset, p.shape[p.tp_dim])
            flat[p.offset : p.offset + p.numel] = tensor.flatten()
        (owned,) = own.owned(at.dp)
        assert torch.equal(state.master, flat[owned.start : owned.stop])


def test_scaled_rotary_positions_are_those_of_the_published_code(tmp_path: Path) -> None:
    scaled = open_source(write(tmp_path, 1, use_scaled_rope=True, rope_scaling_factor=8)).shape
    expected = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert scaled == replace(SHAPE, max_seq=131_072, rope_scaling=expected)


def test_what_is_not_whole_is_told(tmp_path: Path) -> None:
    for changed, message in (
        ({"use_scaled_rope": True}, "no rope_scaling_factor"),
        ({"n_kv_heads": 4}, r"wk\.weight has shape \[12, 24\]"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            Decoder(
                open_source(write(tmp_path / "bad", 1, **changed)),
                dtype=torch.float32,
                device=torch.device("cpu"),
            )
    folder = write(tmp_path / "meta", 2)
    (folder / "consolidated.00.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(InputError, match=r"each from consolidated\.00\.pth on"):
        open_source(folder)
    (folder / "consolidated.00.pth").write_bytes(b"torn")
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(InputError, match="no weights in Meta's format"):
        open_source(folder)


def save_whole(folder: Path, change: dict[str, Tensor]) -> Path:
    """The same model in Hugging Face's format."""
    folder.mkdir()
    index = FlatIndex.of(SHAPE, Layout(), Layout().coordinates(0))
    state = FlatState(index, 0, device=torch.device("cpu"), dtype=torch.float32)
    init_from(write(folder.parent / "source", 1), state, SHAPE)
    tensors = {name: state.weight(name).clone() for name, _ in SHAPE.sizes()} | change
    save_file(
        {hugging_face_name(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config_of(SHAPE, dtype="float32")))
    return folder


def test_weights_verify_reads_all_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = write(tmp_path / "meta", 2)
    same = save_whole(tmp_path / "same", {})
    assert main(["verify", str(same), "--against", str(meta)]) == 0
    assert capsys.readouterr().out == (
        f"{SHAPE.parameters():,} parameters, all there and finite, at most 0 apart\n"
    )
    assert main(["verify", str(meta)]) == 0
    other = save_whole(tmp_path / "other", {"norm.weight": torch.full((24,), 9.0)})
    assert main(["verify", str(other), "--against", str(meta)]) == 1
    assert "norm.weight is another one: near row 0 it differs by" in capsys.readouterr().err
    hole = save_whole(tmp_path / "hole", {"layers.1.ffn_norm.weight": torch.full((24,), float("nan"))})
    assert main(["verify", str(hole)]) == 1
    assert "layers.1.ffn_norm.weight is not finite" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 2
    assert "no weights" in capsys.readouterr().err


def test_the_mean_of_several_is_what_adding_them_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = write(tmp_path / "meta", 2)
    ones = save_whole(tmp_path / "ones", {name: torch.ones(size) for name, size in SHAPE.sizes()})
    out = tmp_path / "mean"
    assert main(["average", str(meta), str(ones), str(ones), "--out", str(out)]) == 0
    found = load_file(out / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(
        found, (theirs()["layers.1.feed_forward.w2.weight"] + 2) / 3, atol=1e-7, rtol=0
    )
    assert main(["average", str(meta), "--out", str(tmp_path / "one")]) == 2
    assert "nothing to average" in capsys.readouterr().err
    (ones / "config.json").write_text((ones / "config.json").read_text().replace("1e-05", "1e-06"))
    assert main(["average", str(meta), str(ones), "--out", str(tmp_path / "other")]) == 2
    assert "norm_eps is 1e-06 there and 1e-05 here" in capsys.readouterr().err
