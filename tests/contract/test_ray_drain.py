"""A repair hook that has Ray drain a node, on a real cluster."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from keepstep.control.repair import Command, Managed, Order, Repairs, Result
from keepstep.core.clock import SystemClock
from keepstep.core.rules import Hook
from keepstep.decide.life import Outcome
from ray_cluster import RayCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def drained(cluster: RayCluster, folder: Path, node: str) -> Result:
    managed = Managed(
        Command(folder / "repairs", SystemClock()), "keepstep.pools.ray.drain", ("--address", cluster.address)
    )
    order = Order(key=f"{node}/3/reboot", node=node, action="reboot", reason="XID 79 on GPU-1")
    hook = Hook(ray="{node}", within_s=120.0, tries=1)
    return asyncio.run(Repairs({"ray": managed}).carry_out(order, hook))


def test_ray_drains_a_node_and_one_that_is_gone_is_not_asked_for(
    ray_cluster: Callable[[], RayCluster], tmp_path: Path
) -> None:
    cluster = ray_cluster()
    cluster.add("sick", 1)
    cluster.add("well", 1)
    result = drained(cluster, tmp_path / "first", "sick")
    assert result.outcome is Outcome.DONE, result
    assert "Ray has drained sick" in result.text and "it is gone" in result.text
    assert cluster.nodes()["sick"] is False and cluster.nodes()["well"] is True
    again = drained(cluster, tmp_path / "second", "sick")
    assert (again.outcome, again.text) == (Outcome.DONE, "Ray has no living node sick")
