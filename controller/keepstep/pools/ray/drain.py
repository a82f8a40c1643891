"""`python -m keepstep.pools.ray.drain`: has Ray drain a node, and waits until it is gone.

Ray places nothing new on it, tells the autoscaler, and ends it when nothing is left on it; whoever keeps the
cluster's nodes brings another one up. A node that is gone already is not asked for again. The last line is
what is told; the exit code says whether it was done.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray

from keepstep.core.clock import SystemClock
from keepstep.core.ids import Node
from keepstep.pools.ray.groups import names
from keepstep.pools.ray.words import RayNode

_CLOCK = SystemClock()
_LOOK_S = 0.5


def drain(node: str, why: str, within_s: float | None = None) -> str:
    """Ask Ray for it; why it is refused, or "". Inside the cluster only, near its GCS.

    `within_s`: None is no deadline.
    """
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = ray._private.worker.global_worker.gcs_client
    deadline_ms = int((_CLOCK.wall() + within_s) * 1000) if within_s else 0  # clocks of a cluster agree
    accepted, problem = client.drain_node(node, reason, why, deadline_ms)
    return "" if accepted else str(problem)


def find(node: str) -> str | None:
    """Ray's id of a living node by keepstep's name of it."""
    rows = [row for row in ray.nodes() if row["Alive"]]
    known = [_node(row) for row in rows]
    return next((id_ for id_, name in names(known).items() if name == Node(node)), None)


def _node(row: dict[str, Any]) -> RayNode:
    return RayNode(id=row["NodeID"], name=row["NodeName"], address=row["NodeManagerAddress"], alive=True)


def main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_args(arguments)
    deadline = _CLOCK.monotonic() + asked.within
    ray.init(address=asked.address, log_to_driver=False, logging_level="ERROR", namespace="keepstep")
    identity = find(asked.node)
    if identity is None:
        _say(f"Ray has no living node {asked.node}")
        return 0  # there is nothing to drain: it is gone
    ask = ray.remote(num_cpus=0)(drain) if asked.address.startswith("ray://") else None
    given = identity, f"{asked.reason} ({asked.key})", asked.within
    refused = ray.get(ask.remote(*given), timeout=asked.within) if ask else drain(*given)
    if refused:
        _say(f"Ray does not drain {asked.node}: {refused}")
        return 1
    while any(row["NodeID"] == identity and row["Alive"] for row in ray.nodes()):
        if _CLOCK.monotonic() > deadline:
            _say(f"Ray drains {asked.node}, and it is still there")
            return 1
        time.sleep(_LOOK_S)
    _say(f"Ray has drained {asked.node} ({identity[:8]}), and it is gone")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("node", "key", "reason", "action"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--within", type=float, required=True, help="seconds")
    parser.add_argument("--address", default="auto")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
