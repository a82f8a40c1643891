"""How a repair that somebody else is to make is written on a Kubernetes node, and read back. Pure.

    condition   KeepstepRepair, "True" while it is wanted; its reason is the action (Reset, Reboot, Replace)
    taint       keepstep.dev/repair=ACTION:NoSchedule, so that nothing new comes onto the node meanwhile
    annotation  keepstep.dev/repair: which repair, and the boot that the node was in; written last, so a node
                that has it was marked wholly
    event       once per key, for whoever watches

Whoever repairs the node sets the condition to "False", with the reason "Failed" if it did not work. A node
that is ready again after another boot needs no such word.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAME = "keepstep.dev/repair"  # of the taint and of the annotation
CONDITION = "KeepstepRepair"
FAILED = "Failed"
_MESSAGE_MAX = 1000
_EVENTS_IN = "default"  # where Kubernetes keeps what happens to nodes

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    key: str
    action: str  # reset, reboot or replace
    reason: str

    @property
    def word(self) -> str:
        """As Kubernetes spells reasons."""
        return self.action.capitalize()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    done: bool
    text: str


def marked(node: Json, repair: Repair) -> bool:
    """Everything was written for this very repair."""
    return bool(_kept(node).get("key") == repair.key)


def marks(node: Json, repair: Repair) -> dict[str, Any]:
    """A patch of the node as it was read: if somebody changes it in between, the server refuses."""
    note = json.dumps({"key": repair.key, "boot": _boot(node)})
    taint = {"key": NAME, "value": repair.action, "effect": "NoSchedule"}
    return _patch(node, note, [*_other_taints(node), taint])


def unmarked(node: Json) -> dict[str, Any]:
    """What takes taint and annotation away again."""
    return _patch(node, None, _other_taints(node))


def wanted(repair: Repair, at: str) -> dict[str, Any]:
    """A patch of the node's status. `at`: RFC 3339."""
    return _condition("True", repair.word, f"{repair.reason} ({repair.key})", at)


def over(answer: Answer, at: str) -> dict[str, Any]:
    """A patch of the node's status."""
    return _condition("False", "Repaired" if answer.done else FAILED, answer.text, at)


def event(node: Json, repair: Repair, at: str) -> dict[str, Any]:
    """Its name follows from the key, so that the same one cannot be there twice."""
    name, uid = node["metadata"]["name"], node["metadata"].get("uid", "")
    digest = hashlib.blake2b(repair.key.encode(), digest_size=6).hexdigest()
    about = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": uid}
    return {
        "metadata": {"name": f"{name}.keepstep-{digest}", "namespace": _EVENTS_IN},
        "involvedObject": about, "reason": f"{repair.word}Wanted", "type": "Warning", "count": 1,
        "message": f"{repair.reason} ({repair.key})"[:_MESSAGE_MAX], "source": {"component": "keepstep"},
        "firstTimestamp": at, "lastTimestamp": at,
    }  # fmt: skip


def answer(node: Json) -> Answer | None:
    """What became of a repair that the node was marked for; None: it is still waited for."""
    conditions = {one["type"]: one for one in node.get("status", {}).get("conditions") or ()}
    said = conditions.get(CONDITION, {})
    if said.get("status") == "False":
        text = str(said.get("message") or said.get("reason") or "")
        return Answer(done=said.get("reason") != FAILED, text=text)
    before, now = _kept(node).get("boot", ""), _boot(node)
    if before and now and before != now and conditions.get("Ready", {}).get("status") == "True":
        return Answer(done=True, text="it was booted anew and is ready")
    return None


def _condition(status: str, reason: str, message: str, at: str) -> dict[str, Any]:
    return {
        "status": {
            "conditions": [
                {
                    "type": CONDITION, "status": status, "reason": reason, "message": message[:_MESSAGE_MAX],
                    "lastTransitionTime": at, "lastHeartbeatTime": at,
                }
            ]
        }
    }  # fmt: skip


def _patch(node: Json, note: str | None, taints: list[Any]) -> dict[str, Any]:
    return {
        "metadata": {
            "resourceVersion": node["metadata"]["resourceVersion"], "annotations": {NAME: note},
        },
        "spec": {"taints": taints or None},
    }  # fmt: skip


def _other_taints(node: Json) -> list[Any]:
    return [taint for taint in node.get("spec", {}).get("taints") or () if taint["key"] != NAME]


def _kept(node: Json) -> Json:
    try:
        kept = json.loads((node["metadata"].get("annotations") or {}).get(NAME) or "{}")
    except ValueError:  # somebody else's hand
        return {}
    return kept if isinstance(kept, dict) else {}


def _boot(node: Json) -> str:
    return str(node.get("status", {}).get("nodeInfo", {}).get("bootID") or "")
