"""keepstep run before anything is started: torchrun's words, and following log files."""

import sys
from pathlib import Path
from typing import Any

import pytest

from keepstep.cli.demo.figures import Comparison, Figures, compare, curve_of
from keepstep.cli.run import command_of, env_of, name_of, nproc_of
from keepstep.cli.tails import Tails
from keepstep.core.errors import InputError


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.py"
    path.write_text("")
    (tmp_path / "train").write_text("")
    return path


def test_what_a_rank_executes(script: Path) -> None:
    plain = {"module": False, "no_python": False}
    assert command_of(["train.py", "--x", "1"], **plain) == ["train.py", "--x", "1"]
    assert command_of(["train", "a"], **plain) == [sys.executable, "train", "a"]
    assert command_of(["pkg.mod", "a"], module=True, no_python=False) == [
        sys.executable,
        "-m",
        "pkg.mod",
        "a",
    ]
    assert command_of(["./a.out"], module=False, no_python=True) == ["./a.out"]


def test_a_script_that_is_not_there_names_its_neighbours(script: Path) -> None:
    with pytest.raises(InputError) as caught:
        command_of(["trian.py"], module=False, no_python=False)
    assert "train.py" in caught.value.next
    with pytest.raises(InputError, match="exclude each other"):
        command_of(["x"], module=True, no_python=True)


def test_numbers_of_ranks() -> None:
    assert nproc_of("3") == 3
    assert nproc_of("cpu") >= 1
    assert nproc_of("auto") >= 1
    for text in ("0", "-1", "many", "1.5", ""):
        with pytest.raises(InputError, match="no number of ranks"):
            nproc_of(text)


def test_environment_and_names() -> None:
    assert env_of(["A=1", "B=x=y", "C="]) == {"A": "1", "B": "x=y", "C": ""}
    for pair in ("A", "1A=2", "=x"):
        with pytest.raises(InputError, match="no NAME=VALUE"):
            env_of([pair])
    assert name_of("dir/My Train.py", module=False) == "my-train"
    assert name_of("pkg.sub.train_it", module=True) == "train-it"
    assert name_of("___.py", module=False) == "run"


class Written:
    def __init__(self) -> None:
        self.data = b""

    def __call__(self, data: bytes) -> None:
        self.data += data


def test_one_rank_goes_through_as_it_is(tmp_path: Path) -> None:
    log = tmp_path / "1" / "rank-0.log"
    log.parent.mkdir()
    written = Written()
    tails = Tails(tmp_path, ranks=1, write=written)
    assert not tails.pump()
    log.write_bytes(b"10 %\r20 %")
    assert tails.pump()
    assert written.data == b"10 %\r20 %"
    with log.open("ab") as file:
        file.write(b"\rdone\n")
    tails.drain()
    assert written.data == b"10 %\r20 %\rdone\n"


def test_several_ranks_are_told_apart_by_whole_lines(tmp_path: Path) -> None:
    folder = tmp_path / "1"
    folder.mkdir()
    written = Written()
    tails = Tails(tmp_path, ranks=2, write=written)
    (folder / "rank-0.log").write_bytes(b"a\nhal")
    (folder / "rank-1.log").write_bytes(b"\xff\n")
    tails.pump()
    assert sorted(written.data.splitlines()) == [b"[rank 0] a", b"[rank 1] \xff"]
    with (folder / "rank-0.log").open("ab") as file:
        file.write(b"f\nend")
    tails.drain()
    assert written.data.splitlines()[2:] == [b"[rank 0] half", b"[rank 0] end"]


def test_a_log_that_was_rotated_is_read_to_its_end_first(tmp_path: Path) -> None:
    log = tmp_path / "1" / "rank-0.log"
    log.parent.mkdir()
    written = Written()
    tails = Tails(tmp_path, ranks=1, write=written)
    log.write_bytes(b"one\n")
    tails.pump()
    with log.open("ab") as file:
        file.write(b"two\n")
    log.rename(log.with_suffix(".log.1"))
    log.write_bytes(b"three\n")
    tails.drain()
    assert written.data == b"one\ntwo\nthree\n"


def test_a_second_attempts_log_follows(tmp_path: Path) -> None:
    written = Written()
    tails = Tails(tmp_path, ranks=1, write=written)
    for attempt in ("1", "2"):
        (tmp_path / attempt).mkdir()
        (tmp_path / attempt / "rank-0.log").write_text(f"attempt {attempt}\n")
        tails.pump()
    tails.drain()
    assert written.data == b"attempt 1\nattempt 2\n"


def test_two_curves() -> None:
    points: list[dict[str, Any]] = [
        {"step": 1, "attempt": 1, "loss": 3.0},
        {"step": 2, "attempt": 2, "loss": 2.5},
        {"step": 2, "attempt": 1, "loss": 9.0},
        {"step": 2, "attempt": 3, "loss": None},
    ]
    assert curve_of(points) == {1: 3.0, 2: 2.5}
    assert compare({1: 3.0, 2: 2.5}, {1: 3.0, 2: 2.25}, steps=2) == Comparison(max_abs=0.25, missing=())
    assert compare({2: 2.25}, {1: 3.0, 2: 2.25}, steps=2) == Comparison(max_abs=0.0, missing=(1,))
    assert compare({1: 3.0}, {1: 3.0, 2: 2.25}, steps=2) == Comparison(max_abs=None, missing=(2,))
    assert compare({}, {}, steps=1) == Comparison(max_abs=None, missing=(1,))


@pytest.mark.parametrize(
    ("recovered", "difference", "missing", "good"),
    [(3, 0.0, (), True), (2, 0.0, (), False), (3, 1e-9, (), False), (3, None, (80,), False),
     (3, 0.0, (30,), False), (3, 0.0, (1, 2, 3, 4), False)],
)  # fmt: skip
def test_when_a_demo_is_good(
    *, recovered: int, difference: float | None, missing: tuple[int, ...], good: bool
) -> None:
    figures = Figures(
        injected=3, recovered=recovered, loss=Comparison(max_abs=difference, missing=missing), goodput=0.9,
        steps=80, steps_replayed=9, wall_s=60.0, ranks_pss_max_bytes=1,
    )  # fmt: skip
    assert figures.good is good
    assert figures.to_dict()["loss_max_abs_difference"] == difference
