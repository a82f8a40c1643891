"""Screening by pairs: over any set of sick nodes and links, what it names is so, and it is soon done."""

from collections.abc import Set

from hypothesis import given, settings
from hypothesis import strategies as st

from keepstep.decide.screen import Pair, Round, Screened, next_round, rounds_max, screened, told


def screen(nodes: list[str], sick: Set[str], links: Set[Pair]) -> tuple[Screened, list[Round]]:
    rounds: list[Round] = []
    while pairs := next_round(nodes, rounds):
        busy = [node for pair in pairs for node in (pair.a, pair.b)]
        assert len(busy) == len(set(busy)), "a node works in one pair at a time"
        assert not any(pair in one for one in rounds for pair in pairs), "no pair is tried twice"
        rounds.append({pair: not ({pair.a, pair.b} & sick or pair in links) for pair in pairs})
    return screened(nodes, rounds), rounds


@st.composite
def pools(draw: st.DrawFn, *, few: bool) -> tuple[list[str], set[str], set[Pair]]:
    """Nodes, sick ones, sick links. A node has one sick link at most: with more it is as good as sick."""
    count = draw(st.integers(8 if few else 0, 70))
    nodes = draw(st.permutations([f"n{k:03}" for k in range(count)]))
    most = count // 8 if few else count
    sick = set(draw(st.lists(st.sampled_from(nodes), max_size=most, unique=True)) if nodes else [])
    ends = [node for node in draw(st.permutations(nodes)) if few or node not in sick]
    number = draw(st.integers(0, (most - len(sick)) if few else len(ends) // 2))
    links = {Pair.of(ends[2 * k], ends[2 * k + 1]) for k in range(min(number, len(ends) // 2))}
    return nodes, sick, links


@given(pools(few=False))
@settings(max_examples=100, deadline=None)
def test_nothing_that_is_named_is_wrong(pool: tuple[list[str], set[str], set[Pair]]) -> None:
    nodes, sick, links = pool
    found, rounds = screen(nodes, sick, links)
    assert found.good.isdisjoint(sick)
    assert found.sick <= sick
    assert found.links <= links
    assert found.good | found.sick | found.open == set(nodes)
    assert len(rounds) <= rounds_max(len(nodes))


@given(pools(few=True))
@settings(max_examples=100, deadline=None)
def test_few_sick_ones_are_all_named_and_so_are_links_that_were_tried(
    pool: tuple[list[str], set[str], set[Pair]],
) -> None:
    nodes, sick, links = pool
    found, rounds = screen(nodes, sick, links)
    assert found.sick == sick
    assert not found.open
    tried = {pair for one in rounds for pair in one}
    assert found.links == {pair for pair in links & tried if not {pair.a, pair.b} & sick}


def test_a_large_pool_takes_a_few_rounds() -> None:
    nodes = [f"n{k:05}" for k in range(4096)]
    found, rounds = screen(nodes, set(nodes[::101]), {Pair.of(nodes[2], nodes[3])})
    assert found.sick == set(nodes[::101])
    assert found.links == {Pair.of(nodes[2], nodes[3])}
    assert len(rounds) == 2  # whoever is sick failed with its neighbour, who is good, and with another


def test_two_nodes_that_fail_together_stay_open() -> None:
    found, rounds = screen(["a", "b"], {"a"}, set())
    assert found == Screened(good=frozenset(), sick=frozenset(), links=frozenset(), open=frozenset("ab"))
    assert len(rounds) == 1


def test_what_is_said_of_each_node() -> None:
    nodes = list("abcdefg")
    _, rounds = screen(nodes, {"a"}, {Pair.of("c", "d")})
    reasons = {Pair.of("a", "e"): "wrong: matmul", Pair.of("c", "d"): "hung: all-reduce"}
    said = {node: told(nodes, rounds, reasons, node) for node in nodes}
    assert said["a"].startswith("fails with b, ")
    assert said["c"] == "its link to d is sick (hung: all-reduce)"
    assert said["f"].startswith("right, with ")
    assert told(["x", "y"], [{Pair.of("x", "y"): False}], {}, "x") == "fails with y"
    assert told(["x", "y"], [], {}, "x") == "could not be tried"
