import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.agent.alone import Bounds, End, GoOn, LookAtFence, Renew, Solitude, judge, judge_fence

COMMAND = Bounds(lease_s=30.0, self_fence_s=30.0, orphan_lease_s=1800.0, attached=False)
TRAINER = Bounds(lease_s=30.0, self_fence_s=None, orphan_lease_s=1800.0, attached=False)
TERMINAL = Bounds(lease_s=30.0, self_fence_s=30.0, orphan_lease_s=1800.0, attached=True)


def after(seconds: float, *, stepping: bool, start: Solitude = Solitude()) -> Solitude:  # noqa: B008 - frozen
    now = start
    for _ in range(int(seconds)):
        now = now.tick(1.0, 1.0, stepped=stepping)
    return now


@pytest.mark.parametrize(
    ("bounds", "alone_s", "stepping", "verdict"),
    [
        (COMMAND, 29, False, GoOn),
        (COMMAND, 30, False, End),  # it may be started elsewhere after this and a margin
        (COMMAND, 1799, True, LookAtFence),  # a gang that steps is well
        (TRAINER, 1799, False, LookAtFence),  # its late writes do no harm
        (TERMINAL, 100_000, False, GoOn),  # nothing is started elsewhere for it
    ],
)
def test_what_silence_alone_says(bounds: Bounds, alone_s: float, stepping: bool, verdict: type) -> None:
    assert isinstance(judge(after(alone_s, stepping=stepping), bounds, attempt=2), verdict)


@pytest.mark.parametrize(
    ("alone_s", "stepping", "fence", "verdict"),
    [
        (60, True, None, GoOn),
        (60, True, 2, GoOn),
        (60, True, 3, End),  # it was replaced: positive evidence, whatever the lease
        (60, True, 1, GoOn),
        (1800, True, 2, Renew),
        (1800, True, None, End),  # nothing says that it is still wanted
        (1800, True, 1, End),
        (1800, False, 2, End),  # wanted, but not stepping: nobody would miss it
    ],
)
def test_what_the_fence_says(alone_s: float, stepping: bool, fence: int | None, verdict: type) -> None:
    now = after(alone_s, stepping=stepping)
    assert isinstance(judge_fence(now, TRAINER, attempt=2, fence=fence), verdict)


def test_a_renewed_lease_runs_again() -> None:
    now = after(1800, stepping=True).renewed()
    assert isinstance(judge_fence(now, TRAINER, attempt=2, fence=2), GoOn)
    now = after(1799, stepping=True, start=now)
    assert isinstance(judge_fence(now, TRAINER, attempt=2, fence=2), GoOn)
    now = after(1, stepping=True, start=now)
    assert isinstance(judge_fence(now, TRAINER, attempt=2, fence=2), Renew)


def test_an_answer_counts_from_when_the_report_was_sent() -> None:
    now = after(20, stepping=False).tick(1.0, 1.0, answered_s=4.0)
    assert now.alone_s == 4.0
    assert now.still_s == 21.0  # an answer is no step
    assert now.unfenced_s == 4.0


def test_a_late_look_counts_as_one_period() -> None:
    now = after(5, stepping=False).tick(3600.0, 1.0)
    assert (now.alone_s, now.still_s) == (6.0, 6.0)


def test_an_answer_after_a_long_sleep_does_not_make_it_lonelier() -> None:
    """The report was sent before the lid was closed; its acknowledgement is read an hour later."""
    now = after(5, stepping=False).tick(3600.0, 1.0, answered_s=3600.0)
    assert now.alone_s <= 6.0


@given(
    looks=st.lists(
        st.tuples(st.floats(0, 100), st.none() | st.floats(0, 50), st.booleans()), min_size=1, max_size=50
    )
)
def test_silence_is_never_more_than_what_was_awake_for(looks: list[tuple[float, float | None, bool]]) -> None:
    now, awake = Solitude(), 0.0
    for elapsed, answered, stepped in looks:
        before = now
        now = now.tick(elapsed, 1.0, answered_s=answered, stepped=stepped)
        awake += min(elapsed, 1.0)
        assert 0 <= now.alone_s <= awake + 1e-6 and 0 <= now.still_s <= awake + 1e-6
        assert now.alone_s <= before.alone_s + 1.0 and now.leased_s <= now.alone_s + 1e-6
        assert not stepped or now.still_s == 0
