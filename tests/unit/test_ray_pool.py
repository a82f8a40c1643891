"""What the Ray pool says of nodes and of the cluster, from one look to the next. No Ray in it."""

import asyncio
from pathlib import Path

from keepstep.core.clock import ManualClock
from keepstep.core.ids import Node
from keepstep.pools.ray.groups import Terms
from keepstep.pools.ray.pool import RayPool, RaySettings
from keepstep.pools.ray.words import Actor, RayNode, Seen


async def never(node: Node) -> str:
    raise AssertionError(f"no credential is needed for {node}")


def made(clock: ManualClock) -> RayPool:
    terms = Terms(owner="me", resource="GPU", labels={})
    settings = RaySettings(address="head:6379", terms=terms, url="http://c:1", folder="/f")
    return RayPool(settings=settings, clock=clock, log_file=Path("/nowhere"), issue=never, term=1)


def node(name: str, identity: str, **more: object) -> RayNode:
    return RayNode(id=identity, name=name, address="", alive=not more, total={"GPU": 8}, **more)  # type: ignore[arg-type]


def said(pool: RayPool, name: str = "a") -> str:
    return asyncio.run(pool.confirm_dead(Node(name)))


def kinds(pool: RayPool) -> list[str]:
    return [news.kind for news in pool._news]


def test_a_node_that_ended_in_order_is_dead_at_once_and_a_silent_one_when_its_raylet_must_be() -> None:
    clock = ManualClock()
    pool = made(clock)
    pool._take(Seen(nodes=(node("a", "1"), node("b", "2"))))
    assert said(pool) == ""
    crashed = node("a", "1", death="2: missed too many heartbeats")
    ended = node("b", "2", death="1: terminated", orderly=True)
    pool._take(Seen(nodes=(crashed, ended)))
    assert said(pool, "b") == "Ray says that node b (2) is dead: 1: terminated"
    assert said(pool) == ""
    clock.advance(74.0)
    assert said(pool) == ""
    clock.advance(2.0)
    assert "missed too many heartbeats" in said(pool)
    assert kinds(pool) == ["ray", "ray node dead", "ray node dead"]


def test_a_node_that_died_while_nobody_looked_counts_from_the_first_look() -> None:
    clock = ManualClock()
    pool = made(clock)
    pool._take(Seen(nodes=(node("a", "1", death="2: missed too many heartbeats"),)))
    assert said(pool) == ""
    clock.advance(76.0)
    assert said(pool) != ""


def test_a_node_that_came_back_under_its_name_is_not_dead() -> None:
    pool = made(ManualClock())
    pool._take(Seen(nodes=(node("a", "1"),)))
    pool._take(Seen(nodes=(node("a", "1", death="terminated", orderly=True),)))
    assert said(pool) != ""
    pool._take(Seen(nodes=(node("a", "1", death="terminated", orderly=True), node("a", "3"))))
    assert said(pool) == ""


def test_a_lost_head_is_said_once_and_so_is_what_came_back() -> None:
    pool = made(ManualClock())
    pool._take(Seen(cluster="x", nodes=(node("a", "1"),), actors=(Actor(name="n", node="1"),)))
    pool._take(Seen(problem="ConnectionError: refused"))
    pool._take(Seen(problem="ConnectionError: refused"))
    pool._take(Seen(cluster="x", nodes=(node("a", "1"),), actors=(Actor(name="n", node="1"),)))
    pool._take(Seen(problem="ConnectionError: refused"))
    pool._take(Seen(cluster="y"))
    assert kinds(pool) == ["ray", "ray lost", "ray back", "ray lost", "ray back"]
    texts = [news.text for news in pool._news]
    assert "does not answer: ConnectionError: refused. What runs goes on" in texts[1]
    assert "the same cluster: 1 agents of ours" in texts[2]
    assert "as another cluster" in texts[4]
