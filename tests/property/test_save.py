"""Nothing that only memory has goes with its holders untried: judged by rules that share no code with it."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from golden.decide_script import spec_of
from keepstep.core.ids import Attempt, JobId, Node, Rank, Step
from keepstep.core.layout import Layout
from keepstep.core.states import JobState
from keepstep.decide.plan import GiveUp, JobChange, Place, Policy, Requeue, Save, Wait
from keepstep.decide.save import saved_first
from keepstep.decide.view import JobView, Kept, Link, Saving, Stored

POLICY = Policy()
NODES = [Node("a"), Node("b"), Node("c")]
kept = st.lists(
    st.builds(
        Kept,
        rank=st.integers(0, 1).map(Rank),
        world=st.just(2),
        attempt=st.just(Attempt(1)),
        step=st.integers(58, 61).map(Step),
        node=st.sampled_from(NODES),
        own=st.booleans(),
        fresh=st.sampled_from([True, True, True, False]),
    ),
    max_size=12,
)
savings = st.none() | st.builds(
    Saving,
    at=st.integers(58, 61).map(lambda step: Stored(attempt=Attempt(1), step=Step(step))),
    age_s=st.sampled_from([0.0, 10.0, 300.0]),
    done=st.booleans(),
    error=st.sampled_from(["", "full"]),
)


def change_to(where: frozenset[Node] | None, newest: int = -1) -> JobChange:
    restore = Stored(attempt=Attempt(1), step=Step(newest)) if newest >= 0 else None
    if where is None:
        return GiveUp(job=JobId("j"), reason="its budget")
    if not where:
        return Requeue(job=JobId("j"), reason="nodes are lacking", wait_s=0.0)
    return Place(
        job=JobId("j"), reason="", attempt=Attempt(2), nodes=tuple(sorted(where)), layout=Layout(tp=2),
        link=Link(attempt=Attempt(2)), restore=restore, rung="spare",
    )  # fmt: skip


def whole(held: list[Kept], where: set[Node]) -> set[int]:
    """Steps that these nodes hold of both ranks, as far as that is certain."""
    each = [
        {one.step for one in held if one.rank == rank and one.node in where and one.fresh} for rank in (0, 1)
    ]
    return {int(step) for step in each[0] & each[1]}


@given(
    held=kept,
    saving=savings,
    stored=st.integers(-1, 61),
    where=st.none() | st.frozensets(st.sampled_from(NODES), max_size=2),
)
def test_what_only_those_have_who_are_let_go_of_is_stored_first(
    held: list[Kept], saving: Saving | None, stored: int, where: frozenset[Node] | None
) -> None:
    job = JobView(
        id=JobId("j"), spec=spec_of("j", {"dp": "1", "tp": "2", "pp": "1"}), state=JobState.RECOVERING,
        attempts=1, lineage=(Link(attempt=Attempt(1)),), kept=tuple(held), checkpoint_step=stored,
        saving=saving,
    )  # fmt: skip
    newest = max(whole(held, set(NODES)), default=-1)
    wanted = change_to(where, newest)
    came = saved_first(job, wanted, POLICY)
    risked = newest > stored and newest not in whole(held, set(where or ()))
    tried = saving is not None and saving.at.step == newest
    over = saving is not None and tried and bool(saving.done or saving.error or saving.age_s >= 300)
    if isinstance(came, Save):
        assert risked
        assert not tried
        assert came.at.step == newest
        for rank, nodes in enumerate(came.memory.holders):
            certain = {one.node for one in held if one.rank == rank and one.step == newest and one.fresh}
            assert set(nodes) == certain
    elif isinstance(came, Wait):
        unsure = {one.rank for one in held if not one.fresh} - {
            one.rank for one in held if one.fresh and one.own
        }
        assert unsure or (risked and tried and not over)
    else:
        assert came is wanted
        assert over or not risked


@given(held=kept, stored=st.integers(-1, 61))
def test_it_is_asked_once_and_waited_for_within_a_bound(held: list[Kept], stored: int) -> None:
    """Whatever becomes of it, the change that was wanted comes to pass."""
    job = JobView(
        id=JobId("j"), spec=spec_of("j", {"dp": "1", "tp": "2", "pp": "1"}), state=JobState.RECOVERING,
        attempts=1, lineage=(Link(attempt=Attempt(1)),), checkpoint_step=stored,
        kept=tuple(one for one in held if one.fresh),
    )  # fmt: skip
    wanted, asked = change_to(None), 0
    for _ in range(3):
        came = saved_first(job, wanted, POLICY)
        if came is wanted:
            break
        assert came is not None
        if isinstance(came, Save):
            asked += 1
            job = replace(job, saving=Saving(at=came.at))
        else:
            assert isinstance(came, Wait)
            assert job.saving is not None
            assert came.due_s <= POLICY.save_within_s
            job = replace(job, saving=replace(job.saving, age_s=came.due_s))
    assert came is wanted
    assert asked <= 1
