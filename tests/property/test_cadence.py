"""How often a state is kept: within the shares that are promised, and no more rarely than they ask for."""

from hypothesis import given
from hypothesis import strategies as st

from keepstep.core.cadence import (
    SAVE_MAX_S,
    SAVE_MIN_S,
    SEND_FLOOR_S,
    SEND_SHARE,
    STALL_FLOOR_S,
    STALL_SHARE,
    STEPS_MAX,
    Costs,
    interval,
    mtbf_s,
    save_interval_s,
)

seconds = st.floats(0.0001, 300.0)


def affordable(every: int, step_s: float, stall_s: float, send_s: float) -> bool:
    space_s = every * step_s * (1 + 1e-9)
    stall = stall_s <= STALL_FLOOR_S or stall_s <= STALL_SHARE * space_s
    return stall and (send_s <= SEND_FLOOR_S or send_s <= SEND_SHARE * space_s)


@given(step_s=seconds, stall_s=seconds, send_s=seconds)
def test_the_fewest_steps_that_keep_within_the_shares(step_s: float, stall_s: float, send_s: float) -> None:
    every = interval(step_s, stall_s, send_s)
    assert 1 <= every <= STEPS_MAX
    assert affordable(every, step_s, stall_s, send_s) or every == STEPS_MAX
    assert every == 1 or not affordable(every - 1, step_s * (1 - 1e-9), stall_s, send_s)


@given(step_s=seconds, stall_s=seconds, send_s=seconds, more=st.floats(1.0, 10.0))
def test_what_costs_more_is_done_no_more_often(
    step_s: float, stall_s: float, send_s: float, more: float
) -> None:
    every = interval(step_s, stall_s, send_s)
    assert interval(step_s, stall_s * more, send_s) >= every
    assert interval(step_s, stall_s, send_s * more) >= every
    assert interval(step_s * more, stall_s, send_s) <= every


@given(st.lists(seconds, max_size=20), st.lists(seconds, min_size=1, max_size=20))
def test_one_slow_moment_of_a_busy_machine_changes_nothing(slow: list[float], steps: list[float]) -> None:
    costs = Costs()
    assert costs.interval == 1, "nothing is known yet"
    costs.steps.extend(steps)
    costs.stalls.extend([*slow, 0.001])
    costs.sends.extend([*slow, 0.01])
    assert costs.interval == 1


def test_a_large_state_is_kept_more_rarely() -> None:
    assert interval(step_s=0.2, stall_s=0.002, send_s=0.05) == 1
    assert interval(step_s=0.2, stall_s=0.04, send_s=0.05) == 4
    assert interval(step_s=0.2, stall_s=0.002, send_s=1.0) == 10


@given(cost_s=seconds, between_s=st.floats(1.0, 1e9))
def test_checkpoints_come_as_often_as_what_they_cost_and_what_they_spare_balance(
    cost_s: float, between_s: float
) -> None:
    """What saving takes a second, and half of what a failure takes a second: least where both are equal."""
    every_s = save_interval_s(cost_s, between_s)
    assert SAVE_MIN_S <= every_s <= SAVE_MAX_S

    def lost(s: float) -> float:
        return cost_s / s + s / 2 / between_s

    if SAVE_MIN_S < every_s < SAVE_MAX_S:
        assert lost(every_s) <= min(lost(every_s * 1.01), lost(every_s / 1.01))


def test_a_gang_that_fails_more_often_than_others_is_known_by_it() -> None:
    published = mtbf_s(16_384, 0, 0.0)
    assert 3 * 3600 < published < 3.2 * 3600  # every three hours, as Llama 3 405B
    hours = 48 * 3600.0
    assert mtbf_s(16_384, 48, hours) < published / 2
    assert mtbf_s(16_384, 4, hours) > published
    assert mtbf_s(8, 0, 0.0) == published * 16_384 / 8
