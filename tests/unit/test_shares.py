"""Where a gang's time goes, from the sums of its ranks."""

import pytest

from keepstep.control.shares import shares
from keepstep.wire.messages import PhaseSeen


def seen(phase: str, total_s: float, waited_s: float = 0.0) -> PhaseSeen:
    return PhaseSeen(phase=phase, count=1, total_s=total_s, waited_s=waited_s)


def test_all_time_in_steps_is_spent_on_one_thing() -> None:
    told = [
        seen("restoring", 60.0, 50.0), seen("data", 1.0), seen("forward", 6.0, 2.0),
        seen("backward", 9.0, 3.0), seen("backward", 2.0), seen("optimizer", 2.0, 1.0),
        seen("collecting", 7.0),
    ]  # fmt: skip
    found = shares(told, 4.0)
    parts = {"data": 0.05, "forward": 0.2, "backward": 0.4, "optimizer": 0.05}
    assert found == pytest.approx(parts | {"communication": 0.1, "bubble": 0.2})
    assert sum(found.values()) == pytest.approx(1.0)


def test_a_bubble_that_was_read_later_than_the_rest_is_no_more_than_all_waiting() -> None:
    found = shares([seen("forward", 4.0, 1.0)], 1.5)
    assert (found["communication"], found["bubble"]) == (0.0, 0.25)


def test_before_a_step_nothing_is_known() -> None:
    assert shares([seen("rendezvous", 3.0)], 0.0) == {}
