"""Every schedule, for every size of pipeline: complete, possible, within its memory, without deadlock."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from keepstep.core.layout import stage_layers
from keepstep.llama.schedule import SCHEDULES, Pass, Pipeline, messages, timetable

plans = st.one_of(
    st.just(Pipeline()),
    st.builds(Pipeline, schedule=st.just("gpipe"), chunks=st.integers(1, 4)),
    st.builds(Pipeline, schedule=st.just("interleaved"), chunks=st.integers(1, 4)),
)
sizes = st.integers(1, 9)
counts = st.integers(1, 24)


def orders(plan: Pipeline, pp: int, micro_batches: int) -> list[list[Pass]]:
    return [plan.passes(pp, rank, micro_batches) for rank in range(pp)]


@given(plan=plans, pp=sizes, micro_batches=counts)
def test_each_pass_is_made_once_and_the_backward_after_its_forward(
    plan: Pipeline, pp: int, micro_batches: int
) -> None:
    for order in orders(plan, pp, micro_batches):
        chunks = range(plan.chunks)
        every = [Pass(b, m, c) for b in (False, True) for m in range(micro_batches) for c in chunks]
        assert sorted(order) == sorted(every)
        at = {one: place for place, one in enumerate(order)}
        assert all(at[one] > at[one._replace(backward=False)] for one in every if one.backward)


@given(plan=plans, pp=sizes, micro_batches=counts)
def test_a_chunk_sees_micro_batches_in_order(plan: Pipeline, pp: int, micro_batches: int) -> None:
    """So gradients are added in the same order whatever the schedule: its choice changes no bit."""
    for order in orders(plan, pp, micro_batches):
        for backward in (False, True):
            for chunk in range(plan.chunks):
                seen = [p.micro_batch for p in order if (p.backward, p.chunk) == (backward, chunk)]
                assert seen == list(range(micro_batches))


@given(plan=plans, pp=sizes, micro_batches=counts)
def test_every_pass_has_what_it_needs_one_message_each(plan: Pipeline, pp: int, micro_batches: int) -> None:
    """timetable raises where ranks wait for ever; here its result is judged without it."""
    ticks = timetable(orders(plan, pp, micro_batches))
    ran = [[row[rank] for row in ticks if row[rank] is not None] for rank in range(pp)]
    assert ran == orders(plan, pp, micro_batches)
    last = pp * plan.chunks - 1
    arrived: set[tuple[int, Pass]] = set()
    for row in ticks:
        for rank, one in enumerate(row):
            if one is not None:
                stage = one.chunk * pp + rank
                if stage != (last if one.backward else 0):
                    arrived.remove((rank, one))
        for message in messages(row, plan.chunks):
            assert (message.receiver, message.to) not in arrived
            arrived.add((message.receiver, message.to))
    assert not arrived


@given(plan=plans, pp=sizes, micro_batches=counts)
def test_no_more_is_held_than_the_schedule_allows(plan: Pipeline, pp: int, micro_batches: int) -> None:
    for rank, order in enumerate(orders(plan, pp, micro_batches)):
        held = most = 0
        for one in order:
            held += -1 if one.backward else 1
            most = max(most, held)
        if plan.schedule == "gpipe":
            bound = micro_batches * plan.chunks
        elif plan.schedule == "1f1b":
            bound = pp - rank
        else:  # a round of pp or, where the number is no multiple, up to twice as many
            rounds = max(1, micro_batches // pp)
            bound = 2 * (pp - rank - 1) + (plan.chunks - 1) * -(-micro_batches // rounds) + 1
        assert most <= min(bound, micro_batches * plan.chunks)


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_the_bubble_is_the_one_of_the_papers(pp: int) -> None:
    """Ticks beyond a rank's own passes: 2 (pp - 1) for 1F1B, of a chunk each where they are interleaved."""
    micro_batches = 4 * pp
    for plan in (Pipeline(), Pipeline(schedule="gpipe"), Pipeline(schedule="interleaved", chunks=4)):
        ticks = timetable(orders(plan, pp, micro_batches))
        assert len(ticks) - 2 * micro_batches * plan.chunks == 2 * (pp - 1)


def test_ranks_that_would_wait_for_ever_are_found() -> None:
    forward, backward = Pass(False, 0, 0), Pass(True, 0, 0)
    with pytest.raises(ValueError, match="every rank waits"):
        timetable([[forward, backward], [backward, forward]])


@given(layers=st.integers(1, 200), stages=st.integers(1, 64))
def test_each_layer_has_one_stage_and_stages_differ_by_one_part(layers: int, stages: int) -> None:
    """Embedding and output are a part each, as a layer is, unless layers alone can be shared out evenly."""
    if stages > layers + 2:
        return
    found = [stage_layers(layers, stages, stage) for stage in range(stages)]
    assert [layer for stage in found for layer in stage] == list(range(layers))
    parts = [len(stage) for stage in found]
    if layers % stages:
        parts[0] += 1
        parts[-1] += 1
        assert min(parts) >= 1
        assert max(parts) - min(parts) <= 1
    else:
        assert set(parts) == {layers // stages}


def test_the_405b_model_on_16_stages_is_cut_as_in_the_paper() -> None:
    counts = [len(stage_layers(126, 16, stage)) for stage in range(16)]
    assert counts == [7, *[8] * 14, 7]
    virtual = [len(stage_layers(126, 128, stage)) for stage in range(128)]
    assert virtual == [0, *[1] * 126, 0], "the first chunk is the embedding alone, the last the output"


def test_known_schedules_are_what_the_options_name() -> None:
    assert {Pipeline(schedule=name).passes(2, 0, 2)[0] for name in SCHEDULES} == {Pass(False, 0, 0)}
