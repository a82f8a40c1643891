"""What should be on a Ray cluster, by what jobs want and what is there."""

from collections.abc import Mapping

import msgspec
import pytest

from keepstep.core.ids import JobId, Node
from keepstep.decide.place import matches
from keepstep.decide.view import RESERVED_FOR
from keepstep.pools.pool import Want
from keepstep.pools.ray.groups import NODE_ID, Shape, Terms, names, shape
from keepstep.pools.ray.words import Actor, Group, RayNode, Seen, Wanted, WantedAgent

TERMS = Terms(owner="me", resource="GPU", labels={"gpu": "h100"})
GANG, EXTRA = "keepstep/me/j/gang-1", "keepstep/me/j/extra-1"


def node(name: str, gpus: float = 8, free: float | None = None, **more: object) -> RayNode:
    return RayNode(
        id=f"id-{name}", name=name, address="10.0.0.1", alive=bool(more.pop("alive", True)),
        total={"CPU": 4, "GPU": gpus} if gpus else {"CPU": 4}, labels={"gpu": "h100"},
        available={"GPU": gpus if free is None else free}, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def want(nodes: int = 2, spares: int = 0, slots: int = 8, using: tuple[str, ...] = ()) -> Want:
    return Want(job=JobId("j"), nodes=nodes, slots=slots, spares=spares, using=frozenset(map(Node, using)))


def group(name: str, *nodes: str, state: str = "CREATED") -> Group:
    return Group(
        name=name, state=state, nodes=tuple(f"id-{n}" if n else "" for n in nodes), resources={"GPU": 8.0}
    )


def shaped(
    wanted: Want | None,
    *nodes: RayNode,
    groups: tuple[Group, ...] = (),
    cordoned: tuple[str, ...] = (),
    asked: Mapping[str, Mapping[str, str]] | None = None,
) -> Shape:
    seen = Seen(nodes=nodes, groups=groups)
    wants = [wanted] if wanted is not None else []
    return shape(TERMS, wants, seen, frozenset(map(Node, cordoned)), asked or {})


def test_a_gang_is_one_group_of_whole_nodes_and_spares_come_after_it() -> None:
    there = [node("a"), node("b"), node("c"), node("d", gpus=16)]
    first = shaped(want(spares=1, slots=4), *there)
    (gang,) = first.groups
    assert (gang.name, gang.bundles, gang.resources) == (GANG, 2, {"GPU": 8.0})
    assert gang.selector == {"gpu": "h100"}
    then = shaped(want(spares=1, slots=4), *there, groups=(group(GANG, "b", "a"),))
    assert [(g.name, g.bundles) for g in then.groups] == [(GANG, 2), (EXTRA, 1)]
    assert then.groups[1].selector[NODE_ID] == "!in(id-a,id-b)"
    assert [(agent.node, agent.bundle) for agent in then.agents] == [("b", 0), ("a", 1)]
    assert f"{RESERVED_FOR}=j" in then.agents[0].arguments


def test_a_bundle_on_a_node_that_goes_gets_a_substitute_and_one_of_a_dead_node_is_rays_to_place() -> None:
    there = [node("a"), node("b", draining=True), node("c")]
    found = shaped(want(using=("a", "b")), *there, groups=(group(GANG, "a", "b"),))
    assert [g.name for g in found.groups] == [GANG, EXTRA]
    assert "id-b" in found.groups[1].selector[NODE_ID]
    dead = [node("a"), node("b", alive=False), node("c")]
    found = shaped(want(), *dead, groups=(group(GANG, "a", "b", state="RESCHEDULING"),))
    assert [g.name for g in found.groups] == [GANG]
    assert [agent.node for agent in found.agents] == ["a"]


def test_extras_that_nobody_needs_go_and_those_in_use_stay() -> None:
    there = [node(name) for name in "abcd"]
    groups = (group(GANG, "a", "b"), group(EXTRA, "c"), group("keepstep/me/j/extra-2", "d"))
    found = shaped(want(spares=1, using=("a", "d")), *there, groups=groups)
    assert [g.name for g in found.groups] == [GANG, "keepstep/me/j/extra-2"]


def test_a_waiting_group_is_asked_for_anew_when_others_are_to_be_avoided() -> None:
    there = [node("a"), node("b")]
    waiting = group(GANG, "", "", state="PENDING")
    same = shaped(want(), *there, groups=(waiting,), asked={GANG: {"gpu": "h100"}})
    assert [g.name for g in same.groups] == [GANG]
    other = shaped(want(), *there, groups=(waiting,), asked={GANG: {"gpu": "h100"}}, cordoned=("a",))
    assert [g.name for g in other.groups] == ["keepstep/me/j/gang-2"]
    assert other.groups[0].selector[NODE_ID] == "!in(id-a)"


def test_a_job_may_ask_for_labels_of_its_own() -> None:
    wanted = Want(job=JobId("j"), nodes=1, slots=8, labels={"rack": "in(r1,r2)"})
    there = [node("a"), node("b")]
    found = shaped(wanted, *there)
    assert found.groups[0].selector == {"gpu": "h100", "rack": "in(r1,r2)"}
    assert "0 of 0 nodes can be had, gpu=h100, rack=in(r1,r2)" in found.waits[JobId("j")]


def test_what_no_job_wants_is_not_wanted() -> None:
    assert shaped(None, node("a"), groups=(group(GANG, "a", "b"),)).groups == ()


def test_it_says_what_is_missing_on_which_nodes_and_what_would_fit() -> None:
    there = [
        node("a"), node("b", free=3), node("c", draining=True, drains_in_s=9.0), node("d"),
        node("e", gpus=4),
    ]  # fmt: skip
    told = shaped(want(nodes=3), *there, cordoned=("d",)).waits[JobId("j")]
    assert told == (
        "Ray is asked for 3 whole nodes with 8 GPU each; 1 of 5 nodes can be had, gpu=h100 (a); "
        "b has 3 free: it is in use; c is being drained; d is cordoned; e has 4; "
        "resources.nodes up to 1 would fit now"
    )


@pytest.mark.parametrize(
    ("have", "selector", "fits"),
    [
        ("h100", "h100", True),
        ("h100", "!h100", False),
        (None, "!h100", True),
        (None, "h100", False),
        ("a", "in(a, b)", True),
        ("c", "in(a,b)", False),
        ("c", "!in(a,b)", True),
    ],
)
def test_selectors_mean_what_ray_means(have: str | None, selector: str, fits: bool) -> None:
    assert matches(have, selector) is fits


def test_a_name_that_two_nodes_have_names_neither() -> None:
    twins = [node("x"), RayNode(id="0123456789", name="x", address="", alive=True)]
    assert names(twins) == {"id-x": "x-id-x", "0123456789": "x-01234567"}


def test_what_is_said_is_read_again() -> None:
    seen = Seen(
        nodes=(node("a", draining=True, drains_in_s=4.0),),
        groups=(group(GANG, "a"),),
        actors=(Actor(name="n", node="i"),),
    )
    assert msgspec.json.decode(msgspec.json.encode(seen), type=Seen) == seen
    agent = WantedAgent(
        actor="n", group=GANG, bundle=0, ray_node="i", resources={"GPU": 8}, node="a", folder="/f"
    )
    wanted = Wanted(agents=(agent,))
    assert msgspec.json.decode(msgspec.json.encode(wanted), type=Wanted) == wanted
