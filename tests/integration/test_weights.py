"""Weights to transformers and back, in every layout."""

import json
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import forked
from keepstep.core.beacon import PAGE
from keepstep.core.checkpoints import MANIFEST, Point, folder_name
from keepstep.core.errors import InputError
from keepstep.core.ids import Attempt, Step
from keepstep.core.layout import Layout
from keepstep.llama.checkpoint import CorruptCheckpoint, Identity, Saver
from keepstep.llama.flat import FlatIndex, FlatState
from keepstep.llama.shape import ModelShape
from keepstep.llama.weights import canonical_name, export, hugging_face_name, init_from, shape_of
from keepstep.session import Session

SHAPE = ModelShape(
    layers=4, dim=24, ffn_dim=40, heads=4, kv_heads=2, vocabulary=260, max_seq=64, rope_theta=1e5
)
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def state_of(layout: Layout, rank: int, shape: ModelShape = SHAPE) -> FlatState:
    coordinates = layout.coordinates(rank)
    index = FlatIndex.of(shape, layout, coordinates)
    return FlatState(index, coordinates.dp, device=torch.device("cpu"), dtype=torch.float32)


def whole(shape: ModelShape = SHAPE) -> dict[str, Tensor]:
    """Every parameter by its canonical name, each element different."""
    source = torch.Generator().manual_seed(5)
    return {name: torch.randn(size, generator=source) for name, size in shape.sizes()}


def expected(state: FlatState) -> Tensor:
    """The owned master weights, cut out of the whole ones a parameter at a time."""
    flat, tensors = torch.zeros(state.index.length), whole()
    for p in state.index.parameters:
        tensor = tensors[p.name]
        if p.tp_dim is not None:
            tensor = tensor.narrow(p.tp_dim, p.tp_offset, p.shape[p.tp_dim])
        flat[p.offset : p.offset + p.numel] = tensor.flatten()
    (owned,) = state.index.owned(state.dp_rank)
    return flat[owned.start : owned.stop]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    state = state_of(Layout(), 0)
    state.master.copy_(expected(state))
    state.exp_avg.fill_(3.0)
    session = Session(mmap.mmap(-1, PAGE), rank=0, world_size=1, attached=False)
    identity = Identity(job="j", attempt=1, layout=Layout(), model=SHAPE)
    saver = Saver(folder, state, identity, group=None, session=session)
    saver.save(7, tokens=0, data={})
    assert saver.close() == 7
    return folder / folder_name(Point(step=Step(7), attempt=Attempt(1)))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cut into several files, so that the index is used."""
    out = tmp_path_factory.mktemp("exported") / "model"
    export(checkpoint, out, file_bytes=40_000)
    return out


def test_names_go_both_ways() -> None:
    names = [name for name, _ in SHAPE.sizes()]
    theirs = [hugging_face_name(name) for name in names]
    assert [canonical_name(name) for name in theirs] == names and len(set(theirs)) == len(names)
    assert canonical_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    assert canonical_name("score.weight") is None


def test_transformers_loads_the_export_and_has_the_same_tensors(exported: Path) -> None:
    from transformers import LlamaForCausalLM

    loaded: Any = LlamaForCausalLM.from_pretrained(exported, output_loading_info=True)
    model, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tensors = whole()
    for name, parameter in model.named_parameters():
        ours = canonical_name(name)
        assert ours is not None and torch.equal(parameter.data, tensors.pop(ours))
    assert tensors == {}
    config = model.config
    assert config.rope_parameters["rope_theta"] == 1e5 and config.rms_norm_eps == SHAPE.norm_eps
    assert shape_of(config.to_dict(), "transformers") == SHAPE


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=3), Layout(dp=2, pp=2, tp=2), Layout(pp=4)], ids=str)
def test_import_into_a_layout(exported: Path, layout: Layout) -> None:
    def work(rank: int) -> None:
        state = state_of(layout, rank)
        init_from(exported, state, SHAPE)
        assert torch.equal(state.master, expected(state))
        assert state.step == 0 and not state.exp_avg.any() and not state.exp_avg_sq.any()

    forked.run(layout.world_size, work)


def test_import_of_what_transformers_saved(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=36, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    shape = shape_of(json.loads((tmp_path / "config.json").read_text()), "config.json")
    assert (shape.kv_heads, shape.vocabulary, shape.norm_eps) == (1, 36, 1e-6)
    state = state_of(Layout(), 0, shape)
    init_from(tmp_path, state, shape)
    theirs = model.state_dict()
    for p in state.index.parameters:
        ours = state.master[p.offset : p.offset + p.numel].view(p.shape)
        assert torch.equal(ours, theirs[hugging_face_name(p.name)])  # output: the tied embedding


def test_half_precision_is_widened(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((exported / "config.json").read_text())
    halves = {hugging_face_name(name): tensor.bfloat16() for name, tensor in whole().items()}
    save_file(halves, tmp_path / "model.safetensors")
    state = state_of(Layout(), 0)
    init_from(tmp_path, state, SHAPE)
    assert torch.equal(state.master, expected(state).bfloat16().float())


def test_a_checkpoint_without_its_moments_is_a_start_too(checkpoint: Path) -> None:
    layout = Layout(tp=2)

    def work(rank: int) -> None:
        state = state_of(layout, rank)
        init_from(checkpoint, state, SHAPE)
        assert torch.equal(state.master, expected(state))
        assert state.step == 0 and not state.exp_avg.any()

    forked.run(2, work)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e5}}, "has no 'factor'"),
        ({"rope_parameters": {"rope_theta": 1e5, **SCALING}}, "rope_scaling is RopeScaling.*and None here"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, r"scaled \(linear\)"),
        ({"attention_bias": True}, "biases"),
        ({"model_type": "qwen3"}, "qwen3"),
        ({"intermediate_size": 80}, "ffn_dim is 80 there and 40 here"),
        ({"head_dim": 8}, "head_dim is 8"),
    ],
)
def test_other_models_are_refused(
    exported: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((exported / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        init_from(tmp_path, state_of(Layout(), 0), SHAPE)


def test_folders_that_hold_no_weights_are_refused(exported: Path, tmp_path: Path) -> None:
    state = state_of(Layout(), 0)
    with pytest.raises(InputError, match=r"config\.json"):
        init_from(tmp_path, state, SHAPE)
    (tmp_path / "config.json").write_text((exported / "config.json").read_text())
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        init_from(tmp_path, state, SHAPE)
    tensors = {hugging_face_name(name): tensor for name, tensor in whole().items()}
    save_file(
        {k: v for k, v in tensors.items() if "layers.3.mlp.up" not in k}, tmp_path / "model.safetensors"
    )
    with pytest.raises(InputError, match=r"layers\.3\.mlp\.up_proj\.weight is in none"):
        init_from(tmp_path, state, SHAPE)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        init_from(tmp_path, state, SHAPE)


def test_export_never_writes_over_anything_and_refuses_damage(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="exists already"):
        export(checkpoint, tmp_path)
    copy = tmp_path / checkpoint.name
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    os.truncate(copy / "__0_0.distcp", 100)
    with pytest.raises(CorruptCheckpoint, match=r"__0_0\.distcp"):
        export(copy, tmp_path / "out")
    (copy / MANIFEST).unlink()
    with pytest.raises(InputError, match="no complete checkpoint"):
        export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_the_command_exports_in_bfloat16(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "keepstep.llama.weights", "export"]
    done = subprocess.run(
        [*command, str(checkpoint), str(out), "--dtype", "bfloat16"],
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and f"{SHAPE.parameters():,} parameters" in done.stdout, done.stderr
    stored = load_file(out / "model.safetensors")
    for name, tensor in whole().items():
        assert torch.equal(stored[hugging_face_name(name)], tensor.bfloat16())
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["bos_token_id"]) == ("bfloat16", 256)


def test_max_seq_may_differ(exported: Path) -> None:
    init_from(exported, state_of(Layout(), 0), replace(SHAPE, max_seq=8192))
