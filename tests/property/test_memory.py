"""What is chosen from memory, judged by rules that share no code with the choice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.core import checkpoints
from keepstep.core.checkpoints import Branch, Point
from keepstep.core.ids import Attempt, JobId, Node, Rank, Step
from keepstep.core.layout import Layout, local_ranks
from keepstep.decide.buddies import buddies
from keepstep.decide.restore import memory_point
from keepstep.decide.view import Kept, Link


@st.composite
def lineages(draw: st.DrawFn) -> tuple[tuple[Attempt, Attempt, Step], ...]:
    """Attempts, each from some state of an earlier one, or from nothing."""
    count = draw(st.integers(1, 5))
    return tuple(
        (Attempt(n), Attempt(draw(st.integers(0, n - 1))), Step(draw(st.integers(1, 6))))
        for n in range(1, count + 1)
    )


helds = st.lists(
    st.builds(
        Kept,
        rank=st.integers(0, 3).map(Rank),
        world=st.sampled_from([2, 4]),
        attempt=st.integers(1, 5).map(Attempt),
        step=st.integers(1, 6).map(Step),
        node=st.sampled_from([Node("a"), Node("b")]),
        own=st.booleans(),
    ),
    max_size=24,
)


@given(lineage=lineages(), kept=helds)
def test_nothing_in_memory_is_restored_off_the_chain(
    lineage: tuple[tuple[Attempt, Attempt, Step], ...], kept: list[Kept]
) -> None:
    """Judged by the rule that agents and trainers check checkpoints with, which shares no code with it."""
    links = [
        Link(attempt=n, parent=parent, parent_step=step if parent else Step(0)) for n, parent, step in lineage
    ]
    point = memory_point(links, kept, Layout(dp=2, tp=2))
    if point.at is None or point.memory is None:
        return
    branches = [
        Branch(job=JobId("j"), attempt=n, parent=Point(step=step, attempt=parent) if parent else None)
        for n, parent, step in lineage
    ]
    assert checkpoints.on_chain(Point(step=point.at.step, attempt=point.at.attempt), lineage[-1][0], branches)
    assert len(point.memory.holders) == point.memory.layout.world_size
    for rank, nodes in enumerate(point.memory.holders):
        held = [one for one in kept if one.rank == rank and one.world == point.memory.layout.world_size]
        assert set(nodes) <= {one.node for one in held if one.step == point.at.step}
        assert nodes


@given(old=st.sampled_from([1, 2, 3, 4, 6, 12]), new=st.sampled_from([1, 2, 3, 4, 6, 12]), pieces=st.just(12))
def test_another_layout_finds_every_element_once(old: int, new: int, pieces: int) -> None:
    shard, mine = pieces // old, pieces // new
    for dp in range(new):
        covered: list[int] = []
        for source in Layout(dp=new).sources(Layout(dp=old), dp):
            first, last = max(dp * mine, source * shard), min((dp + 1) * mine, (source + 1) * shard)
            assert first < last, "asked for nothing"
            covered += range(first, last)
        assert covered == list(range(dp * mine, (dp + 1) * mine))


@pytest.mark.parametrize("nodes, dp, tp", [(2, 2, 2), (4, 2, 4), (4, 4, 2), (3, 3, 1), (8, 2, 8)])
def test_a_buddy_is_of_another_replica_and_serves_one(nodes: int, dp: int, tp: int) -> None:
    layout = Layout(dp=dp, tp=tp)
    names = [Node(f"n{k}") for k in range(nodes)]
    found = buddies(names, layout)
    assert sorted(found.values()) == sorted(names)
    for k, node in enumerate(names):
        mine, theirs = (
            {layout.coordinates(rank).dp for rank in local_ranks(layout.world_size, nodes, place)}
            for place in (k, names.index(found[node]))
        )
        assert mine.isdisjoint(theirs)


def test_a_gang_on_one_node_has_no_buddies_but_a_spare() -> None:
    assert buddies([Node("a")], Layout(dp=2)) == {}
    assert buddies([Node("a")], Layout(dp=2), [Node("s"), Node("t")]) == {"a": "s"}


@given(
    nodes=st.integers(1, 8),
    dp=st.sampled_from([1, 2, 4]),
    tp=st.sampled_from([2, 8]),
    spares=st.integers(0, 9),
)
def test_whichever_node_is_lost_every_rank_is_left(nodes: int, dp: int, tp: int, spares: int) -> None:
    """Spares are used before nodes of the gang are, none keeps copies for two, and nobody for itself."""
    layout = Layout(dp=dp, tp=tp)
    gang = [Node(f"n{k}") for k in range(nodes) if layout.world_size % nodes == 0] or [Node("n0")]
    idle = [Node(f"s{k}") for k in range(spares)]
    found = buddies(gang, layout, idle)
    assert len(set(found.values())) == len(found)
    assert all(node != buddy for node, buddy in found.items())
    assert len({buddy for buddy in found.values() if buddy in idle}) == min(len(idle), len(gang))
    if len(gang) + len(idle) > 1:
        for lost in (*gang, *idle):
            for k, node in enumerate(gang):
                holders = {node, found[node]} - {lost}
                assert holders, f"ranks {local_ranks(layout.world_size, len(gang), k)} went with {lost}"


def test_spares_serve_those_first_whose_buddy_is_of_their_own_replica() -> None:
    layout = Layout(dp=2, tp=3)  # three nodes of two ranks: every node shares a replica with a neighbour
    gang = [Node("a"), Node("b"), Node("c")]
    alone, helped = buddies(gang, layout), buddies(gang, layout, [Node("s")])
    [served] = [node for node in gang if helped[node] == "s"]
    places = {
        node: {layout.coordinates(rank).dp for rank in local_ranks(6, 3, k)} for k, node in enumerate(gang)
    }
    assert places[served] & places[alone[served]]
