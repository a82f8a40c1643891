"""Figures for other tools: after a recovery the curve goes on, and no tool can hold up or fail a step."""

import importlib.util
import json
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keepstep.core.errors import InputError
from keepstep.llama.metrics import Metrics, writers_of


class Recorder:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Broken(Recorder):
    def write(self, step: int, values: Mapping[str, float]) -> None:
        super().write(step, values)
        if step == 2:
            raise OSError("disk full")


class Stuck(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        assert self.released.wait(60)
        super().write(step, values)


def job(**metrics: Any) -> Any:
    return SimpleNamespace(id="tiny-a1b2", metrics=metrics)


def test_a_writer_that_breaks_is_told_once_and_left(capsys: pytest.CaptureFixture[str]) -> None:
    def never() -> Recorder:
        raise RuntimeError("no key")

    broken, other = Broken(), Recorder()
    metrics = Metrics({"never": never, "broken": lambda: broken, "other": lambda: other})
    for step in range(1, 6):
        metrics.write(step, {"loss": 1.0})
    metrics.close()
    assert (broken.steps, broken.closed) == ([1, 2], False)
    assert (other.steps, other.closed) == ([1, 2, 3, 4, 5], True)
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": it is left")[0] for line in told] == ["metrics: never", "metrics: broken"]
    assert told[1].endswith("OSError: disk full")


def test_a_writer_that_hangs_holds_nobody_up(capsys: pytest.CaptureFixture[str]) -> None:
    stuck = Stuck()
    metrics = Metrics({"stuck": lambda: stuck})
    for step in range(3000):
        metrics.write(step, {"loss": 1.0})
    stuck.released.set()
    metrics.close()
    assert 1000 < len(stuck.steps) < 1100 and stuck.steps == sorted(set(stuck.steps)) and stuck.closed
    assert capsys.readouterr().err.count("too slowly") == 1


def test_without_its_package_the_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert writers_of(job(), 0) == {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    assert list(writers_of(job(tensorboard="/logs"), 0)) == ["tensorboard"]
    with pytest.raises(InputError, match=r"wandb is not installed here(.|\n)*keepstep\[metrics\]"):
        writers_of(job(wandb={"project": "p"}), 0)


WRITES = """
import json, sys
from keepstep.llama.job import TrainJob
from keepstep.llama.metrics import Metrics, writers_of

description, step, stop = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
metrics = Metrics(writers_of(TrainJob.parse(description), step))
for done in range(step + 1, stop + 1):
    metrics.write(done, {"train/loss": done + step / 100, "speed/mfu": float("nan")})
    if done % 2 == 0:
        metrics.write(done, {"validation/loss": 10.0 * done})
metrics.write(step, {"train/loss": -1.0})  # of the past
metrics.close()
"""


def attempts(folder: Path, **metrics: Any) -> None:
    """One makes five steps; the next is restored after the third, and makes six."""
    description = {
        "job": "tiny-a1b2", "layout": {"dp": 1, "pp": 1, "cp": 1, "tp": 1}, "steps": 6,
        "model": {
            "layers": 1, "dim": 8, "ffn_dim": 8, "heads": 1, "kv_heads": 1, "vocabulary": 8, "max_seq": 8,
        },
        "batch": {"global_tokens": 8, "seq": 8}, "metrics": metrics,
    }  # fmt: skip
    for step, stop in ((0, 5), (3, 6)):
        command = [sys.executable, "-c", WRITES, json.dumps(description), str(step), str(stop)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=True)
        assert "metrics:" not in done.stderr, done.stderr


def test_tensorboard_shows_the_steps_of_the_newest_attempt(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="keepstep[metrics] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    attempts(tmp_path, tensorboard=str(tmp_path / "board"))
    found = EventAccumulator(str(tmp_path / "board" / "tiny-a1b2"))
    found.Reload()
    assert found.Tags()["scalars"] == ["train/loss", "validation/loss"]
    losses = {event.step: event.value for event in found.Scalars("train/loss") if event.value > 0}
    assert losses == pytest.approx({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.03, 5: 5.03, 6: 6.03})
    steps = [event.step for event in found.Scalars("validation/loss")]
    assert sorted(steps) == sorted(set(steps)) == [2, 4, 6]


def test_a_run_of_wandb_goes_on_by_the_jobs_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="keepstep[metrics] is not installed")
    attempts(tmp_path, wandb={"project": "p", "entity": None, "mode": "offline", "dir": str(tmp_path)})
    runs = [records(path) for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    begun = [record.run for run in runs for record in run if record.WhichOneof("record_type") == "run"]
    assert [(run.run_id, run.project, run.display_name) for run in begun] == [
        ("tiny-a1b2", "p", "tiny-a1b2")
    ] * 2
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for run in runs
        for record in run
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 4, 5, 6], "not the step of the past"
    assert [row["train/loss"] for row in rows] == [1, 2, 3, 4, 5, 4.03, 5.03, 6.03]
    assert [row["_step"] for row in rows if "validation/loss" in row] == [2, 4, 4, 6]


def records(path: Path) -> list[Any]:
    """Of one of its files: LevelDB's log format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in {1, 4}:  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found
