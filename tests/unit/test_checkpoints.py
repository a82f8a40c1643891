"""Names, fence and lineage of a checkpoint folder: what agents and trainers both read."""

import subprocess
import sys
from pathlib import Path

import pytest

from keepstep.core import durable
from keepstep.core.checkpoints import (
    MANIFEST,
    Branch,
    Found,
    Point,
    branches_of,
    folder_name,
    inventory,
    on_chain,
    point_of,
    raise_fence,
    read_fence,
    read_lineage,
    restorable,
    write_branch,
)
from keepstep.core.errors import InputError
from keepstep.core.ids import Attempt, JobId, Step

JOB = JobId("llama-k3f9")


def at(step: int, attempt: int) -> Point:
    return Point(step=Step(step), attempt=Attempt(attempt))


def lineage(*rows: tuple[int, int | None, int | None]) -> list[Branch]:
    return branches_of(JOB, rows)


def test_names_go_both_ways_and_sort_like_states() -> None:
    assert folder_name(at(60, 2)) == "step-00000060-attempt-0002"
    for point in (at(0, 1), at(60, 2), at(123_456_789, 12_345)):
        assert point_of(folder_name(point)) == point
    for name in ("lineage", "step-60-attempt-2", "step-00000060-attempt-0002.old", "step-00000060"):
        assert point_of(name) is None
    assert sorted([at(60, 3), at(60, 2), at(50, 9)]) == [at(50, 9), at(60, 2), at(60, 3)]


def test_inventory_tells_complete_from_incomplete(tmp_path: Path) -> None:
    assert inventory(tmp_path / "nowhere") == []
    for point in (at(20, 1), at(10, 1)):
        (tmp_path / folder_name(point)).mkdir()
    (tmp_path / folder_name(at(10, 1)) / MANIFEST).write_text("{}")
    (tmp_path / "lineage").mkdir()
    (tmp_path / "step-00000030-attempt-0001").write_text("a file is no checkpoint")
    assert inventory(tmp_path) == [Found(at=at(10, 1), complete=True), Found(at=at(20, 1), complete=False)]


@pytest.mark.parametrize(
    ("point", "allowed"),
    [
        (at(90, 4), True),  # its own
        (at(70, 3), True),  # where it branched off
        (at(71, 3), False),  # past that point
        (at(60, 2), False),  # attempt 2 was left for a branch from attempt 1
        (at(50, 1), True),
        (at(51, 1), False),
        (at(1, 5), False),  # a later attempt
        (at(1, 9), False),  # one that nobody recorded
    ],
)
def test_only_the_chain_may_be_restored(point: Point, allowed: bool) -> None:
    branches = lineage((1, None, None), (2, 1, 60), (3, 1, 50), (4, 3, 70), (5, 4, 80))
    assert on_chain(point, Attempt(4), branches) is allowed


def test_a_lineage_that_goes_forward_in_time_is_not_followed_for_ever() -> None:
    assert not on_chain(at(1, 1), Attempt(3), lineage((3, 4, 10), (4, 3, 10)))


def test_newest_first_with_each_next_one_as_fallback() -> None:
    branches = lineage((1, None, None), (2, 1, 60))
    found = [
        Found(at=at(50, 1), complete=True),
        Found(at=at(60, 1), complete=True),
        Found(at=at(70, 1), complete=True),  # off the chain
        Found(at=at(65, 2), complete=True),
        Found(at=at(75, 2), complete=False),
    ]
    assert restorable(found, Attempt(2), branches) == [at(65, 2), at(60, 1), at(50, 1)]
    assert restorable(found, Attempt(2), branches, not_past=Step(60)) == [at(60, 1), at(50, 1)]


def test_a_fence_is_never_lowered(tmp_path: Path) -> None:
    assert read_fence(tmp_path) is None
    raise_fence(tmp_path / "new", Attempt(3))
    raise_fence(tmp_path / "new", Attempt(2))
    assert read_fence(tmp_path / "new") == 3


def test_lineage_survives_the_disk(tmp_path: Path) -> None:
    assert read_lineage(tmp_path) == []
    branches = lineage((1, None, None), (2, 1, 60))
    for branch in reversed(branches):
        write_branch(tmp_path, branch)
    (tmp_path / "lineage" / "notes.txt").write_text("not ours")
    assert read_lineage(tmp_path) == branches


@pytest.mark.parametrize("content", ["", "[]", '{"attempt": "two"}', '{"attempt": true}'])
def test_a_damaged_fence_is_an_error_not_an_absence(tmp_path: Path, content: str) -> None:
    (tmp_path / "fence.json").write_text(content)
    with pytest.raises(InputError, match=r"fence\.json: cannot be read"):
        read_fence(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    durable.write(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_listing_needs_the_standard_library_only() -> None:
    program = (
        "import sys; before = set(sys.modules); import keepstep.core.checkpoints;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - sys.stdlib_module_names - {'keepstep'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
