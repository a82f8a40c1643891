"""The folder of a job's checkpoints, as trainers write it and agents list it. Standard library only.

    <dir>/fence.json                          the newest attempt: older ones no longer commit
    <dir>/lineage/attempt-0002.json           where attempt 2 branched off: its parent attempt and step
    <dir>/step-00000060-attempt-0002/         one checkpoint; without a manifest it is incomplete
        manifest.json                         written last, by rename: its presence means complete

A folder is never used twice. What may be restored is a matter of lineage: a checkpoint counts if its attempt
is an ancestor of the present one and its step is not past the point where the chain left that attempt. The
fence only stops late writers early; no file system gives a compare-and-set.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepstep.core import durable
from keepstep.core.errors import InputError
from keepstep.core.ids import Attempt, JobId, Step

MANIFEST = "manifest.json"
_FENCE = "fence.json"
_LINEAGE = "lineage"
_FOLDER = re.compile(r"step-(\d{8,})-attempt-(\d{4,})")
_BRANCH = re.compile(r"attempt-(\d{4,})\.json")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Point:
    """A state of the job: after `step` completed steps, as `attempt` made them. The newest sorts last."""

    step: Step
    attempt: Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint's folder."""

    at: Point
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """How an attempt began: from a state of its parent, or (None) from the beginning."""

    job: JobId
    attempt: Attempt
    parent: Point | None


def folder_name(at: Point) -> str:
    return f"step-{at.step:08d}-attempt-{at.attempt:04d}"


def point_of(name: str) -> Point | None:
    """What a folder's name says, or None for a folder that is none of ours."""
    match = _FOLDER.fullmatch(name)
    return Point(step=Step(int(match[1])), attempt=Attempt(int(match[2]))) if match else None


def inventory(folder: Path) -> list[Found]:
    """Every checkpoint in a folder, oldest step first; nothing for a folder that does not exist (yet).

    OSError when it cannot be read: "could not look" is not "nothing there".
    """
    try:
        entries = list(folder.iterdir())
    except FileNotFoundError:
        return []
    found = [
        Found(at=at, complete=(entry / MANIFEST).is_file())
        for entry in entries
        if (at := point_of(entry.name)) is not None and entry.is_dir()
    ]
    return sorted(found, key=lambda one: one.at)


def branches_of(job: JobId, rows: Iterable[Sequence[int | None]]) -> list[Branch]:
    """The lineage as a launch has it: rows of attempt, parent's attempt, parent's step (None: no parent)."""
    branches = []
    for attempt, parent_attempt, parent_step in rows:
        assert attempt is not None
        parent = None
        if parent_attempt is not None and parent_step is not None:
            parent = Point(step=Step(parent_step), attempt=Attempt(parent_attempt))
        branches.append(Branch(job=job, attempt=Attempt(attempt), parent=parent))
    return branches


def on_chain(at: Point, attempt: Attempt, branches: Iterable[Branch]) -> bool:
    """Whether a state lies on the chain of `attempt`: may be restored by it, and by what follows it."""
    if at.attempt == attempt:
        return True
    by_attempt = {branch.attempt: branch for branch in branches}
    seen = attempt
    while (branch := by_attempt.get(seen)) is not None and branch.parent is not None:
        parent = branch.parent
        if parent.attempt >= seen:
            return False  # a lineage that does not go back in time is not to be trusted
        if at.attempt == parent.attempt:
            return at.step <= parent.step
        seen = parent.attempt
    return False


def restorable(
    found: Iterable[Found], attempt: Attempt, branches: Sequence[Branch], *, not_past: Step | None = None
) -> list[Point]:
    """Complete checkpoints on the chain of `attempt`, the newest first: each is the next one's fallback."""
    points = [
        one.at
        for one in found
        if one.complete
        and on_chain(one.at, attempt, branches)
        and (not_past is None or one.at.step <= not_past)
    ]
    return sorted(points, reverse=True)


def read_fence(folder: Path) -> Attempt | None:
    """The newest attempt that may commit; None where nobody ever set one. InputError for a damaged file."""
    value = _read(folder / _FENCE)
    return None if value is None else Attempt(_whole(value, "attempt", folder / _FENCE))


def raise_fence(folder: Path, attempt: Attempt) -> None:
    """Shut out attempts older than `attempt`; a fence is never lowered."""
    folder.mkdir(parents=True, exist_ok=True)
    present = read_fence(folder)
    if present is None or present < attempt:
        durable.write_json(folder / _FENCE, {"attempt": attempt})


def read_lineage(folder: Path) -> list[Branch]:
    """How every attempt so far began, by attempt."""
    try:
        names = sorted(entry.name for entry in (folder / _LINEAGE).iterdir())
    except FileNotFoundError:
        return []
    branches = []
    for name in names:
        path = folder / _LINEAGE / name
        if _BRANCH.fullmatch(name) is None or (value := _read(path)) is None:
            continue
        parent = value.get("parent")
        branches.append(
            Branch(
                job=JobId(str(value.get("job", ""))),
                attempt=Attempt(_whole(value, "attempt", path)),
                parent=None if parent is None else _point(parent, path),
            )
        )
    return sorted(branches, key=lambda branch: branch.attempt)


def write_branch(folder: Path, branch: Branch) -> None:
    """Record how an attempt begins, before it does."""
    (folder / _LINEAGE).mkdir(parents=True, exist_ok=True)
    parent = branch.parent
    durable.write_json(
        folder / _LINEAGE / f"attempt-{branch.attempt:04d}.json",
        {
            "job": branch.job,
            "attempt": branch.attempt,
            "parent": None if parent is None else {"attempt": parent.attempt, "step": parent.step},
        },
    )


def _point(value: object, path: Path) -> Point:
    if not isinstance(value, dict):
        raise _damaged(path, "the parent is not an object")
    return Point(
        step=Step(_whole(value, "step", path)),
        attempt=Attempt(_whole(value, "attempt", path)),
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, "it is not a JSON object")
    return value


def _whole(value: dict[str, Any], key: str, path: Path) -> int:
    number = value.get(key)
    if not isinstance(number, int) or isinstance(number, bool):
        raise _damaged(path, f"{key} is not a whole number")
    return number


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        "cannot be read",
        where=str(path),
        why=why,
        next="keepstep writes this file in one step; restore it from a copy, or use a new checkpoint folder.",
    )
