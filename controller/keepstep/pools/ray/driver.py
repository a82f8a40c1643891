"""The process that has Ray: `python -m keepstep.pools.ray.driver ADDRESS PREFIX TERM`.

It says on its standard output what it sees of the cluster, takes from its standard input what there should
be, and makes and removes until both agree. It decides nothing. It may die at any time: everything it made is
detached and found again by name. It ends with its controller, when its standard input closes; and where that
was suspended and another has taken over meanwhile, before it touches anything: the cluster keeps the term.

A client of a cluster (`ray://`) is told less than a driver inside, so there an actor of its own looks.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import msgspec
import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.util import get_placement_group
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from keepstep.core.clock import SystemClock
from keepstep.pools.ray.drain import drain
from keepstep.pools.ray.keeper import Keeper
from keepstep.pools.ray.words import NAMESPACE, Actor, Group, RayNode, Seen, Wanted, WantedAgent, WantedGroup

log = logging.getLogger(__name__)

_CLOCK = SystemClock()
_TICK_S = 0.25
_BEAT_S = 1.0
_AGAIN_S = 2.0  # an actor that dies is not started more often
_DRAIN_AGAIN_S = 30.0  # a node that Ray did not drain is not asked for more often
_LEAVE_WITHIN_S = 25.0
_ANSWER_WITHIN_S = 10.0
# Words for deaths that a raylet announced itself. A node whose drain was due and that fell silent is called
# preempted, too: that is no evidence that its processes ended.
_ORDERLY = {"EXPECTED_TERMINATION", "AUTOSCALER_DRAIN_IDLE"}
_NATIVE = {"CPU": "num_cpus", "GPU": "num_gpus"}


class Inside:
    """Looks at the cluster from inside of it, and asks what only a driver inside may ask."""

    def look(self, prefix: str) -> Seen:
        from ray._private.state import state

        drained = state.get_draining_nodes()
        available = state.available_resources_per_node()
        nodes = [_node(node, drained, available) for node in ray.nodes()]
        groups = [_group(row) for row in placement_group_table().values() if row["name"].startswith(prefix)]
        rows = [row for row in state.actor_table(None).values() if row["Name"].startswith(prefix)]
        actors = [
            Actor(name=row["Name"], node=row["Address"]["NodeID"])
            for row in rows
            if row["State"] not in {"DEAD", "DEPENDENCIES_UNREADY"}
        ]
        return Seen(
            cluster=str(ray._private.worker.global_worker.gcs_client.cluster_id.hex()),
            version=ray.__version__,
            nodes=tuple(nodes),
            groups=tuple(sorted((group for group in groups if group is not None), key=lambda g: g.name)),
            actors=tuple(sorted(actors, key=lambda actor: actor.name)),
            failures={row["Name"]: why for row in rows if (why := _failure(row))},
        )

    def drain(self, node: str, why: str) -> str:
        return drain(node, why)


def _node(row: dict[str, Any], drained: dict[str, int], available: dict[str, Any]) -> RayNode:
    # Here, since what an actor is made of goes over the wire with what its module names, and this cannot.
    from ray.core.generated.common_pb2 import NodeDeathInfo

    identity = row["NodeID"]
    drains_in_s = None
    draining = identity in drained and row["Alive"]
    died = NodeDeathInfo.Reason.Name(row.get("DeathReason") or 0)
    if draining and drained[identity] > 0:  # Ray says it in wall time only: clocks of a cluster agree
        drains_in_s = max(0.0, round(drained[identity] / 1000 - _CLOCK.wall(), 1))
    return RayNode(
        id=identity,
        name=row["NodeName"],
        address=row["NodeManagerAddress"],
        alive=row["Alive"],
        total=row["Resources"],
        available=available.get(identity, {}),
        labels=row.get("Labels") or {},
        death="" if row["Alive"] else f"{died}: {row.get('DeathReasonMessage')}",
        orderly=not row["Alive"] and died in _ORDERLY,
        draining=draining,
        drains_in_s=drains_in_s,
    )


def _failure(row: dict[str, Any]) -> str:
    """Why an actor could not begin: the last line of what it raised."""
    cause = row.get("DeathCause")
    if row["State"] != "DEAD" or cause is None or not cause.HasField("creation_task_failure_context"):
        return ""
    raised = str(cause.creation_task_failure_context.formatted_exception_string).strip()
    return raised.splitlines()[-1][:500] if raised else "it failed while it was created"


def _group(row: dict[str, Any]) -> Group | None:
    if row["state"] == "REMOVED":
        return None
    where = row["bundles_to_node_id"]
    count = len(row["bundles"])
    nodes = tuple(where.get(index) or "" for index in range(count))
    return Group(name=row["name"], state=row["state"], nodes=nodes, resources=dict(row["bundles"][0]))


class Driver:
    def __init__(
        self,
        prefix: str,
        say: Callable[[Seen], None],
        look: Callable[[], Seen],
        drain: Callable[[str, str], str],
        term: int,
    ) -> None:
        self._prefix, self._say, self._look, self._drain = prefix, say, look, drain
        self._term = term
        self._leaving: dict[str, float] = {}  # actors that were told to go, and since when
        self._renewed: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._drained: dict[str, float] = {}
        self._said, self._said_at = Seen(), 0.0

    def turn(self, wanted: Wanted | None) -> None:
        seen = self._look()
        now = _CLOCK.monotonic()
        if _without_ages(seen) != _without_ages(self._said) or now - self._said_at >= _BEAT_S:
            self._said, self._said_at = seen, now
            self._say(seen)
        if wanted is not None:
            _fence(self._prefix, self._term)
            self._remove(wanted, seen, now)
            self._make(wanted, seen, now)
            self._ask_to_drain(wanted, seen, now)

    def _remove(self, wanted: Wanted, seen: Seen, now: float) -> None:
        groups = {group.name for group in wanted.groups}
        agents = {agent.actor for agent in wanted.agents}
        alive = {node.id for node in seen.nodes if node.alive}
        busy = set()
        for actor in seen.actors:
            if actor.name in agents:
                continue
            since = self._leaving.setdefault(actor.name, now)
            if since == now:
                _call(actor.name, "leave")
            elif now - since > _LEAVE_WITHIN_S or actor.node not in alive:
                _kill(actor.name)
            busy.add(actor.name.rpartition("/")[0])
        for name in set(self._leaving) - {actor.name for actor in seen.actors}:
            del self._leaving[name]
        for group in seen.groups:
            if group.name not in groups and group.name not in busy:
                with contextlib.suppress(ValueError):  # it has gone already
                    remove_placement_group(get_placement_group(group.name))

    def _make(self, wanted: Wanted, seen: Seen, now: float) -> None:
        groups = {group.name for group in seen.groups}
        actors = {actor.name for actor in seen.actors}
        for group in wanted.groups:
            if group.name not in groups:
                _ask_for(group)
        for agent in wanted.agents:
            if agent.actor not in actors and agent.group in groups and agent.endpoint:
                if now - self._started.get(agent.actor, -_AGAIN_S) < _AGAIN_S:
                    continue
                self._started[agent.actor] = now
                _start(agent)
                self._renewed[agent.actor] = agent.renewed
            elif agent.renewed > self._renewed.get(agent.actor, 0):
                _call(agent.actor, "renew", agent.endpoint)
                self._renewed[agent.actor] = agent.renewed

    def _ask_to_drain(self, wanted: Wanted, seen: Seen, now: float) -> None:
        for node in seen.nodes:
            why = wanted.drains.get(node.id)
            early = now - self._drained.get(node.id, -_DRAIN_AGAIN_S) < _DRAIN_AGAIN_S
            if why is None or early or node.draining or not node.alive:
                continue
            self._drained[node.id] = now
            problem = self._drain(node.id, why)
            if problem:
                log.warning("Ray does not drain %s: %s", node.name, problem)


def _fence(prefix: str, term: int) -> None:
    """Errors: RuntimeError where a controller of a newer term has been here."""
    key = f"{prefix}term"
    newest = int(_internal_kv_get(key, namespace=NAMESPACE) or 0)
    if newest > term:
        raise RuntimeError(f"a controller of term {newest} has taken over from term {term}")
    if newest < term:
        _internal_kv_put(key, str(term), namespace=NAMESPACE)


def _ask_for(group: WantedGroup) -> None:
    placement_group(
        [group.resources] * group.bundles,
        strategy="STRICT_SPREAD",
        name=group.name,
        lifetime="detached",
        bundle_label_selector=[group.selector] * group.bundles,
    )


def _start(agent: WantedAgent) -> None:
    native = {_NATIVE[name]: amount for name, amount in agent.resources.items() if name in _NATIVE}
    others = {name: amount for name, amount in agent.resources.items() if name not in _NATIVE}
    options = {"num_cpus": 0, **native, "resources": others}
    where = PlacementGroupSchedulingStrategy(get_placement_group(agent.group), agent.bundle)
    ray.remote(Keeper).options(
        name=agent.actor,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=0,
        max_concurrency=4,
        scheduling_strategy=where,
        **options,
    ).remote(agent.folder, agent.node, agent.arguments, agent.endpoint, agent.group)


def _call(name: str, method: str, *arguments: str) -> None:
    try:
        getattr(ray.get_actor(name), method).remote(*arguments)
    except ValueError:
        return  # it has gone already


def _kill(name: str) -> None:
    try:
        ray.kill(ray.get_actor(name))
    except ValueError:
        return


def _without_ages(seen: Seen) -> Seen:
    nodes = tuple(
        msgspec.structs.replace(node, drains_in_s=None if node.drains_in_s is None else 0.0)
        for node in seen.nodes
    )
    return msgspec.structs.replace(seen, nodes=nodes)


class _Ear:
    """The newest line of the standard input."""

    def __init__(self) -> None:
        self.wanted: Wanted | None = None
        self.news = threading.Event()
        threading.Thread(target=self._listen, name="ear", daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin.buffer:
            self.wanted = msgspec.json.decode(line, type=Wanted)
            self.news.set()
        os._exit(0)  # the controller is gone: what it wanted stays, and the next one finds it


def connect(address: str) -> None:
    """Errors: ConnectionError, RuntimeError (another version, for one), at once where nobody listens."""
    where = urlsplit(address if "://" in address else f"ray://{address}")
    if where.port is not None:
        socket.create_connection((where.hostname or "", where.port), _ANSWER_WITHIN_S).close()
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)


def main() -> None:
    address, prefix, term = sys.argv[1], sys.argv[2], int(sys.argv[3])
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever Ray prints goes to the log

    def say(seen: Seen) -> None:
        out.write(msgspec.json.encode(seen) + b"\n")

    ear = _Ear()
    try:
        connect(address)
        if ray.util.client.ray.is_connected():
            there = ray.remote(Inside).options(num_cpus=0).remote()

            def ask(method: Any, *arguments: str) -> Any:
                return ray.get(method.remote(*arguments), timeout=_ANSWER_WITHIN_S)

            driver = Driver(prefix, say, partial(ask, there.look, prefix), partial(ask, there.drain), term)
        else:
            driver = Driver(prefix, say, partial(Inside().look, prefix), Inside().drain, term)
        while True:
            driver.turn(ear.wanted)
            ear.news.wait(_TICK_S)
            ear.news.clear()
    except Exception as problem:  # outermost: whoever started this is told, and starts it again
        say(Seen(problem=f"{type(problem).__name__}: {str(problem).strip()}"[:2000]))
        raise


if __name__ == "__main__":
    main()
