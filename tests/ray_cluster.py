"""A real Ray cluster of several nodes on this machine, in a process of its own that takes orders.

Ray prints errors of its own when nodes are killed and starts threads that never end; a test's process is
better without it. Whatever happens, the processes that it started are ended by their ids.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]
# Of each node: nobody uses the object store here, or reads its logs elsewhere.
_LEAST: Json = {"object_store_memory": 80 << 20, "include_log_monitor": False}
_START_WITHIN_S = 120.0
_ANSWER_WITHIN_S = 60.0


class RayCluster:
    """The tests' end. Nodes have a name, slots (a custom resource) and labels."""

    resource = "slot"

    def __init__(self, folder: Path, *, kept: bool = False) -> None:
        """`kept`: its head writes down what it knows, so that it can come back as the same cluster."""
        folder.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "PYTHONWARNINGS": "ignore"}
        if kept:
            environment |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / "gcs")}
        self._log = (folder / "cluster.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment,
            start_new_session=True,
        )  # fmt: skip
        found = json.loads(self._line())
        self.address, self.client_address = str(found["address"]), str(found["client"])

    def add(self, name: str, slots: int = 2, **labels: str) -> None:
        self._ask("add", name, slots, labels)

    def raylet(self, name: str) -> int:
        """Its process id."""
        return int(self._ask("raylet", name))

    def kill(self, name: str) -> None:
        """kill -9 of the raylet."""
        self._ask("kill", name)

    def terminate(self, name: str) -> None:
        """The node leaves in order."""
        self._ask("terminate", name)

    def drain(self, name: str, within_s: float, reason: str = "maintenance") -> None:
        """As a cloud does that takes a node back."""
        self._ask("drain", name, within_s, reason)

    def scale_down(self, name: str) -> str:
        """What the autoscaler does with an idle node; why Ray will not, or ""."""
        return str(self._ask("scale_down", name))

    def nodes(self) -> dict[str, bool]:
        """By name, whether Ray says that they are alive (the newest of a name)."""
        return dict(self._ask("nodes"))

    def actors(self) -> list[Json]:
        """keepstep's living ones, as Ray's control service lists them."""
        return list(self._ask("actors"))

    def groups(self) -> list[Json]:
        """keepstep's placement groups that are not removed, as Ray's control service lists them."""
        return list(self._ask("groups"))

    def demand(self) -> list[Json]:
        """The bundles that the autoscaler is told of as waiting."""
        return list(self._ask("demand"))

    def kill_head(self) -> None:
        """kill -9 of the control service."""
        self._ask("kill_head")

    def restart_head(self, *, anew: bool = False) -> None:
        """The control service comes back, at the same address; `anew`: and has forgotten everything."""
        self._ask("restart_head", anew)

    def set_version(self, version: str) -> str:
        """What the cluster says of its Ray version to whoever connects; returns what it said before."""
        return str(self._ask("set_version", version))

    def until(self, condition: Callable[[], Any], what: str, within_s: float = 60.0) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {within_s} s for {what}"
            time.sleep(0.2)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ANSWER_WITHIN_S)
        with contextlib.suppress(ProcessLookupError):  # what is left is of a node that did not come up
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        self._process.stdout.close()
        self._log.close()

    def _ask(self, verb: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, *arguments]).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(self._line())
        assert "error" not in answer, answer["error"]
        return answer["answer"]

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the cluster's process ended: {self._log.name}"
        return line


# ---------------------------------------------------------------- the process that has Ray


class _Host:
    def __init__(self) -> None:
        import ray

        self._ray = ray
        self._client_port = _free_port()
        self._before: Any = None  # the cluster whose head has been replaced by one that knew nothing
        self._cluster = self._begin()
        self._nodes: dict[str, Any] = {}
        self._connect()

    def _connect(self) -> None:
        self._ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")

    def _begin(self, **more: Any) -> Any:
        from ray.cluster_utils import Cluster

        head = {
            "num_cpus": 2, "include_dashboard": False, "node_name": "head",
            "ray_client_server_port": self._client_port, **_LEAST, **more,
        }  # fmt: skip
        return Cluster(initialize_head=True, head_node_args=head)

    def where(self) -> Json:
        return {"address": self._cluster.address, "client": f"ray://127.0.0.1:{self._client_port}"}

    def add(self, name: str, slots: int, labels: dict[str, str]) -> None:
        self._nodes[name] = self._cluster.add_node(
            num_cpus=2, resources={RayCluster.resource: slots}, node_name=name, labels=labels, **_LEAST
        )

    def raylet(self, name: str) -> int:
        return int(self._nodes[name].all_processes["raylet"][0].process.pid)

    def kill(self, name: str) -> None:
        os.kill(self.raylet(name), signal.SIGKILL)

    def terminate(self, name: str) -> None:
        os.kill(self.raylet(name), signal.SIGTERM)

    def drain(self, name: str, within_s: float, reason: str) -> None:
        problem = self._drain(name, within_s, "DRAIN_NODE_REASON_PREEMPTION", reason)
        assert not problem, problem

    def scale_down(self, name: str) -> str:
        return self._drain(name, 60.0, "DRAIN_NODE_REASON_IDLE_TERMINATION", "idle")

    def _drain(self, name: str, within_s: float, kind: str, reason: str) -> str:
        from ray.core.generated import autoscaler_pb2

        node = next(n["NodeID"] for n in self._ray.nodes() if n["NodeName"] == name and n["Alive"])
        why = autoscaler_pb2.DrainNodeReason.Value(kind)
        deadline_ms = int((time.time() + within_s) * 1000)
        accepted, problem = self._gcs().drain_node(node, why, reason, deadline_ms)
        return "" if accepted else str(problem)

    def nodes(self) -> dict[str, bool]:
        return {n["NodeName"]: n["Alive"] for n in sorted(self._ray.nodes(), key=lambda n: bool(n["Alive"]))}

    def actors(self) -> list[Json]:
        from ray._private.state import state

        mine = [a for a in state.actor_table(None).values() if a["Name"].startswith("keepstep/")]
        called = {node["NodeID"]: node["NodeName"] for node in self._ray.nodes()}
        return [
            {"name": a["Name"], "pid": a["Pid"], "node": called.get(a["Address"]["NodeID"], "")}
            for a in mine
            if a["State"] != "DEAD"
        ]

    def groups(self) -> list[Json]:
        found = self._ray.util.placement_group_table().values()
        mine = [group for group in found if group["name"].startswith("keepstep/")]
        return [{"name": g["name"], "state": g["state"]} for g in mine if g["state"] != "REMOVED"]

    def demand(self) -> list[Json]:
        from ray.core.generated import autoscaler_pb2

        reply = autoscaler_pb2.GetClusterResourceStateReply()
        reply.ParseFromString(self._gcs().get_cluster_resource_state())
        gangs = reply.cluster_resource_state.pending_gang_resource_requests
        return [
            {
                "bundles": [
                    dict(r.resources_bundle) for r in (g.requests or g.bundle_selectors[0].resource_requests)
                ]
            }
            for g in gangs
        ]

    def _gcs(self) -> Any:
        return self._ray._private.worker.global_worker.gcs_client

    def kill_head(self) -> None:
        os.kill(self._cluster.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)

    def restart_head(self, anew: bool) -> None:
        head = self._cluster.head_node
        if not anew:
            head.kill_gcs_server(check_alive=False)
            head.start_gcs_server()
            return
        self._ray.shutdown()
        port = int(self._cluster.address.rpartition(":")[2])
        head.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        shutil.rmtree(os.environ["RAY_gcs_storage_path"])  # noqa: SIM112 - Ray spells it so
        self._before, self._cluster = self._cluster, self._begin(gcs_server_port=port)
        self._connect()

    def set_version(self, version: str) -> str:
        from ray._common.usage import usage_constants
        from ray.experimental.internal_kv import _internal_kv_initialized

        assert _internal_kv_initialized()
        client = self._gcs()
        key, space = usage_constants.CLUSTER_METADATA_KEY, b"cluster"
        said = json.loads(client.internal_kv_get(key, space))
        client.internal_kv_put(key, json.dumps({**said, "ray_version": version}).encode(), True, space)
        return str(said["ray_version"])

    def close(self) -> None:
        self._ray.shutdown()
        self._cluster.shutdown()
        if self._before is not None:
            self._before.shutdown()


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _serve() -> None:
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    host = _Host()
    try:
        out.write(json.dumps(host.where()).encode() + b"\n")
        for line in sys.stdin.buffer:
            verb, *arguments = json.loads(line)
            try:
                answer = {"answer": getattr(host, verb)(*arguments)}
            except Exception as problem:  # noqa: BLE001 - told to whoever asked
                answer = {"error": repr(problem)}
            out.write(json.dumps(answer).encode() + b"\n")
    finally:
        host.close()


if __name__ == "__main__":
    _serve()
