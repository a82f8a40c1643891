"""Nodes that Kubernetes' people repair: a real API server, and whoever repairs is this test."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepstep.control.repair import Command, Managed, Order, Repairs, Result
from keepstep.core.clock import SystemClock
from keepstep.core.rules import Hook
from keepstep.decide.life import Outcome
from kube_api import MISSING, KubeApi, programs

pytest.importorskip("kubernetes", reason="Kubernetes' client is not installed")
from keepstep.pools.kubernetes.marks import CONDITION, NAME

pytestmark = [pytest.mark.slow, pytest.mark.skipif(programs() is None, reason=MISSING)]
STRATEGIC = "application/strategic-merge-patch+json"
OTHER = {"key": "example.com/kept", "value": "x", "effect": "NoExecute"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    made = KubeApi(tmp_path_factory.mktemp("kube"))
    yield made
    made.close()


class Machine:
    """A node of that API server, and its repair by the controller's own way."""

    def __init__(self, api: KubeApi, folder: Path, name: str) -> None:
        self._api, self._folder, self.name = api, folder, name
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"taints": [OTHER]}}
        api.call("POST", "/api/v1/nodes", node)
        self.boot("boot-1", ready="True")

    def boot(self, boot: str, ready: str) -> None:
        self.status({"nodeInfo": _info(boot), "conditions": [{"type": "Ready", "status": ready}]})

    def status(self, status: dict[str, Any]) -> None:
        self._api.call("PATCH", f"/api/v1/nodes/{self.name}/status", {"status": status}, STRATEGIC)

    def answers(self, reason: str, text: str) -> None:
        condition = {"type": CONDITION, "status": "False", "reason": reason, "message": text}
        self.status({"conditions": [condition]})

    def read(self) -> dict[str, Any]:
        return dict(json.loads(self._api.call("GET", f"/api/v1/nodes/{self.name}")))

    @property
    def condition(self) -> tuple[str, str]:
        conditions = self.read()["status"]["conditions"]
        said: dict[str, str] = next((one for one in conditions if one["type"] == CONDITION), {})
        return said.get("status", ""), said.get("reason", "")

    @property
    def taints(self) -> list[str]:
        """Without the server's own, of a node that never was ready."""
        keys = [taint["key"] for taint in self.read()["spec"].get("taints", ())]
        return [key for key in keys if not key.startswith("node.kubernetes.io/")]

    def events(self) -> list[tuple[str, str]]:
        items = json.loads(self._api.call("GET", "/api/v1/namespaces/default/events"))["items"]
        return [(e["reason"], e["message"]) for e in items if e["involvedObject"]["name"] == self.name]

    def until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}: {self.read()}"
            time.sleep(0.05)

    def repaired(self, action: str = "reboot", within_s: float = 60.0, name: str = "") -> Result:
        clock = SystemClock()
        managed = Managed(Command(self._folder / "repairs", clock), "keepstep.pools.kubernetes.repair")
        order = Order(key=f"{self.name}/7/{action}", node=self.name, action=action, reason="XID 79 on GPU-1")
        hook = Hook(kubernetes=name or "{node}", within_s=within_s, tries=1)
        return asyncio.run(Repairs({"kubernetes": managed}).carry_out(order, hook))

    def beginning(self, **asked: Any) -> "Under":
        return Under(lambda: self.repaired(**asked))


class Under(threading.Thread):
    """A repair under way."""

    def __init__(self, repair: Any) -> None:
        super().__init__()
        self._repair, self.result = repair, Result(outcome=Outcome.BEGUN)
        self.start()

    def run(self) -> None:
        self.result = self._repair()

    def ended(self) -> Result:
        self.join(90)
        return self.result


@pytest.fixture
def machine(
    api: KubeApi, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name).removeprefix("test-").strip("-")
    return Machine(api, tmp_path, name)


def test_a_node_is_marked_until_it_was_booted_anew(machine: Machine) -> None:
    under = machine.beginning()
    machine.until(lambda: NAME in machine.taints, "the taint")
    assert machine.condition == ("True", "Reboot") and machine.taints == [OTHER["key"], NAME]
    machine.boot("boot-2", ready="False")
    machine.boot("boot-2", ready="True")
    result = under.ended()
    assert (result.outcome, result.text) == (Outcome.DONE, "it was booted anew and is ready")
    assert machine.taints == [OTHER["key"]] and machine.condition == ("False", "Repaired")
    assert NAME not in machine.read()["metadata"].get("annotations", {})
    key = f"{machine.name}/7/reboot/1"
    assert machine.events() == [("RebootWanted", f"XID 79 on GPU-1 ({key})")]
    # The same again is the same again: nothing is marked, nothing is told.
    assert machine.repaired().outcome is Outcome.DONE
    assert machine.condition == ("False", "Repaired") and len(machine.events()) == 1


@pytest.mark.parametrize(
    ("reason", "outcome"), [("Repaired", Outcome.DONE), ("Failed", Outcome.FAILED)], ids=["done", "failed"]
)
def test_whoever_repairs_it_answers(machine: Machine, reason: str, outcome: Outcome) -> None:
    under = machine.beginning(action="drain and reset")
    machine.until(lambda: NAME in machine.taints, "the taint")
    assert machine.condition == ("True", "Reset")
    machine.answers(reason, "by ada")
    result = under.ended()
    assert result.outcome is outcome and "by ada" in result.text
    assert machine.taints == [OTHER["key"]]


def test_nobody_answers(machine: Machine) -> None:
    result = machine.repaired(within_s=20.0)
    assert result.outcome is Outcome.FAILED and "nobody did it" in result.text, result
    assert machine.taints == [OTHER["key"]] and machine.condition == ("False", "Failed")


def test_what_is_to_be_replaced_stays_marked(machine: Machine) -> None:
    result = machine.repaired(action="replace")
    assert result.outcome is Outcome.DONE and "marked to be replaced" in result.text
    assert NAME in machine.taints and machine.condition == ("True", "Replace")


def test_a_node_that_kubernetes_does_not_have(machine: Machine) -> None:
    result = machine.repaired(name="nobody")
    assert result.outcome is Outcome.FAILED and "HTTP 404" in result.text


def _info(boot: str) -> dict[str, str]:
    names = (
        "machineID", "systemUUID", "kernelVersion", "osImage", "containerRuntimeVersion", "kubeletVersion",
        "kubeProxyVersion", "operatingSystem", "architecture",
    )  # fmt: skip
    return {**dict.fromkeys(names, "test"), "bootID": boot}
