"""`keepstep generate` as it is typed."""

import io
import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vocabularies
from keepstep.core.beacon import PAGE
from keepstep.core.layout import Layout
from keepstep.llama.checkpoint import Identity, Saver
from keepstep.llama.flat import FlatIndex, FlatState
from keepstep.llama.generation.__main__ import main
from keepstep.llama.initial import initialise
from keepstep.llama.shape import ModelShape
from keepstep.llama.weights import export
from keepstep.session import Session

SHAPE = ModelShape(layers=2, dim=24, ffn_dim=40, heads=4, kv_heads=2, vocabulary=260, max_seq=64)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of them; the newer has other weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    index = FlatIndex.of(SHAPE, Layout(), Layout().coordinates(0))
    for step in (3, 7):
        state = FlatState(index, 0, device=torch.device("cpu"), dtype=torch.float32)
        initialise(state, SHAPE, seed=step)
        session = Session(mmap.mmap(-1, PAGE), rank=0, world_size=1, attached=False)
        identity = Identity(job="j", attempt=1, layout=Layout(), model=SHAPE)
        saver = Saver(folder, state, identity, group=None, session=session)
        saver.save(step, tokens=0, data={"digest": "bytes-1:0123"})
        assert saver.close() == step
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_folder_of_checkpoints_its_newest_and_its_export_say_the_same(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoints / "step-00000007-attempt-0001", tmp_path / "out")
    texts = []
    for weights in (checkpoints, checkpoints / "step-00000007-attempt-0001", tmp_path / "out"):
        code, out, err = said(capsys, weights, "-p", "def ", "--max-tokens", 9, "--ignore-stops")
        assert code == 0 and err.startswith("9 tokens in ") and out.endswith("\n")
        texts.append(out)
    assert texts[0] == texts[1] == texts[2]
    older = said(capsys, checkpoints / "step-00000003-attempt-0001", "-p", "def ", "--max-tokens", 9)
    assert older[0] == 0 and older[1] != texts[0]


def test_many_prompts_are_json_lines_whatever_the_batch(
    checkpoints: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(json.dumps({"prompt": "x" * n, "id": n}) + "\n" for n in (1, 9, 4, 2, 30))
    found = []
    for batch in (1, 2, 8):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code, out, _ = said(
            capsys,
            checkpoints,
            "-f",
            "-",
            "--batch",
            batch,
            "--max-tokens",
            12,
            "--temperature",
            1,
            "--top-p",
            0.9,
        )
        assert code == 0
        found.append(sorted((json.loads(line) for line in out.splitlines()), key=lambda one: one["number"]))
    assert found[0] == found[1] == found[2]
    assert [one["id"] for one in found[0]] == [1, 9, 4, 2, 30]
    assert {one["ended"] for one in found[0]} <= {"stop", "length"}
    assert all(one["tokens"] == 12 for one in found[0] if one["ended"] == "length")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt"),
        (["-p", "a", "-f", "b"], "two places"),
        (["-p", "a", "--max-tokens", "0"], "--max-tokens: 0 is too few"),
        (["-p", "a", "--top-p", "2"], "2.0 is no probability"),
        (["-p", "a" * 64], "prompt 1 has 65 tokens"),
        (["-p", "a", "--chat"], "has no chat format"),
        (["-p", "a", "--tokenizer", "/nowhere"], "there is no tokenizer"),
        (["-f", "/nowhere"], "/nowhere: cannot be read"),
        (["-f", "{bad}"], "line 2 is no prompt"),
        (["-f", "{wrong}"], "is no prompt"),
    ],
)
def test_what_cannot_be_answered_is_told(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "bad").write_text('{"prompt": "a"}\n{"text": "a"}\n')
    (tmp_path / "wrong").write_text('{"prompt": 7}\n')
    files = {"{bad}": str(tmp_path / "bad"), "{wrong}": str(tmp_path / "wrong")}
    code, out, err = said(capsys, checkpoints, *(files.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


def test_weights_of_another_tokenizer_are_refused(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vocabularies.write_tiktoken({bytes([k]): k for k in range(256)}, tmp_path / "tokenizer.model")
    code, _, err = said(capsys, checkpoints, "-p", "a", "--tokenizer", model)
    assert code == 2 and "it has 512 entries, the model 260" in err
    code, _, err = said(capsys, tmp_path / "none", "-p", "a")
    assert code == 2 and "no weights to start from" in err


@pytest.mark.slow  # a process that imports torch
def test_the_command_becomes_the_trainers(checkpoints: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "keepstep.cli.main",
        "generate",
        str(checkpoints),
        "-p",
        "import ",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "import "
