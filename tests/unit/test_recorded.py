"""Recordings of other people's trainers: nobody is ended in them, and a hang at their end is found."""

from pathlib import Path

import pytest

import recorded

pytestmark = pytest.mark.parametrize("path", recorded.recordings(), ids=lambda path: path.stem)


def test_nobody_is_ended(path: Path) -> None:
    assert recorded.spans(path)["still_s_max"] > 5.0, "somebody is asked for nothing"
    assert recorded.kills(path) == []


@pytest.mark.parametrize("phase", ["data", "backward"])
def test_a_hang_is_found_from_what_was_recorded(path: Path, phase: str) -> None:
    found = recorded.hung(path, phase)
    assert found.bound_s is not None and found.began_s is not None
    assert found.bound_s <= found.began_s <= 2 * found.bound_s
    assert found.bound_s < recorded.SPEC.recovery.hang_after_unknown_s, "it is the learnt one"
