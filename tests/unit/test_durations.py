"""How long a phase may take, from what was seen of it."""

import pytest

from keepstep.core.beacon import BINS, Phase, bin_of
from keepstep.core.durations import COMPUTING_FLOOR_S, FACTOR, OUTSIDE_FLOOR_S, Usual, bound_s


def usual(*seconds: float, times: int = 1, origins: int = 1) -> Usual:
    bins = [0] * BINS
    for each in seconds:
        bins[bin_of(round(each * 1e9))] += times
    return Usual(count=times * len(seconds), origins=origins, longest_s=max(seconds), bins=tuple(bins))


def test_a_phase_is_known_when_each_rank_completed_it_five_times() -> None:
    assert bound_s(Phase.FORWARD, usual(0.01, times=4)) is None
    assert bound_s(Phase.FORWARD, usual(0.01, times=5)) is not None
    assert bound_s(Phase.FORWARD, usual(0.01, times=5, origins=2)) is None


@pytest.mark.parametrize("phase", [Phase.NONE, Phase.UNKNOWN])
def test_a_phase_without_a_name_has_no_bound(phase: Phase) -> None:
    assert bound_s(phase, usual(0.01, times=10_000)) is None


def test_two_oddities_of_a_rank_are_none_of_the_usual_and_the_third_is() -> None:
    many = [0.01] * 1000
    none, two, three = (bound_s(Phase.FORWARD, usual(*many, *[30.0] * odd)) or 0 for odd in (0, 2, 3))
    assert two == pytest.approx(none, rel=0.1)
    assert three > COMPUTING_FLOOR_S + FACTOR * 20.0


def test_little_known_is_patient_and_what_speaks_to_the_outside_more_so() -> None:
    few, many = usual(1.0, times=5), usual(1.0, times=5000)
    assert (bound_s(Phase.FORWARD, few) or 0) > 5 * (bound_s(Phase.FORWARD, many) or 0)
    assert (bound_s(Phase.DATA, many) or 0) > OUTSIDE_FLOOR_S
    assert (bound_s(Phase.BACKWARD, many, outside=True) or 0) > OUTSIDE_FLOOR_S
