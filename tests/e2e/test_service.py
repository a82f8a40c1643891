"""The service around the jobs: it comes by itself and goes by itself."""

import time
from collections.abc import Callable

from cluster import Cluster
from keepstep.cli import service
from keepstep.core.home import lives

Start = Callable[..., Cluster]


def test_without_jobs_and_clients_it_ends_and_takes_its_agents_along(start: Start) -> None:
    cluster = start(nodes=2, slots=1, idle_exit_s=4.0)
    running = cluster.running
    deadline = time.monotonic() + 120
    while lives(running.pid, running.start_ticks):
        assert time.monotonic() < deadline, "nobody asks it anything, and it stays"
        time.sleep(0.1)
    assert service.find(cluster.home) is None
    while left := cluster.left_behind():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_controller_that_ends_leaves_its_agents_to_the_next_one(start: Start) -> None:
    cluster = start(nodes=2, slots=1)
    before = {node: cluster.agent_pid(node) for node in ("a", "b")}
    cluster.kill_controller()
    cluster.start()
    cluster.until(lambda: len(cluster.connected()) == 2, "the agents to come back")
    assert {node: cluster.agent_pid(node) for node in ("a", "b")} == before
