"""From a rank's pipe to its bounded files."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from keepstep.agent.rank.logs import Output, RotatedLog


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RotatedLog]:
    log = RotatedLog(tmp_path / "rank-0.log", limit_bytes=100, files=3)
    yield log
    log.close()


def _files(folder: Path) -> list[bytes]:
    """Oldest first."""
    return [path.read_bytes() for path in sorted(folder.iterdir(), reverse=True)]


def test_files_turn_over_between_lines(log: RotatedLog, tmp_path: Path) -> None:
    for number in range(10):
        log.write(b"line %d of this log\n" % number)  # 18 bytes: five to a file
    assert [file.count(b"\n") for file in _files(tmp_path)] == [5, 5]
    assert b"".join(_files(tmp_path)) == b"".join(b"line %d of this log\n" % number for number in range(10))


def test_the_last_line_is_kept_though_it_has_no_end(log: RotatedLog, tmp_path: Path) -> None:
    log.write(b"one\ntw")
    log.write(b"o")
    assert _files(tmp_path) == [b"one\ntwo"]


def test_the_oldest_goes(log: RotatedLog, tmp_path: Path) -> None:
    for number in range(1000):
        log.write(b"%09d\n" % number)
    kept = b"".join(_files(tmp_path)).split()
    assert len(_files(tmp_path)) == 3
    assert kept == [b"%09d" % number for number in range(1000 - len(kept), 1000)]
    assert len(kept) > 20


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    log = RotatedLog(Path("/dev/full"), limit_bytes=1 << 40, files=1)
    log.write(b"lost\n")
    assert log.dropped_bytes == 5
    log.close()


@settings(max_examples=60, deadline=None)
@given(some.lists(some.binary(max_size=260).map(lambda data: data.replace(b"\r", b"\n")), max_size=12))
def test_bounded_and_in_order_whatever_is_written(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = RotatedLog(folder / "rank-0.log", limit_bytes=100, files=3)
    for chunk in chunks:
        log.write(chunk)
    log.close()
    files = _files(folder)
    assert len(files) <= 3
    assert all(len(file) <= 100 for file in files)
    assert b"".join(chunks).endswith(b"".join(files))
    assert sum(map(len, files)) >= min(sum(map(len, chunks)), 101)


def test_one_turn_takes_only_its_share(tmp_path: Path) -> None:
    pipe, end = os.pipe()
    log = RotatedLog(tmp_path / "rank-0.log", limit_bytes=1 << 20, files=1)
    output = Output(pipe, log)
    os.write(end, b"x" * 60_000)
    output.pump()
    assert (tmp_path / "rank-0.log").stat().st_size == 60_000
    assert output.open
    os.close(end)
    output.pump()
    assert not output.open
    output.close()
