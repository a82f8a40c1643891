"""`python -m keepstep.pools.kubernetes.repair`: has a node repaired by whoever looks after a cluster's nodes.

It marks the node (`marks`), waits until somebody has answered, and takes its marks away. For a node that is
to be replaced nobody answers: it stays marked. It finds its cluster like kubectl, or by the pod that it runs
in, and needs to read and patch nodes, to patch nodes/status and to create events. The last line is what is
told; the exit code says whether it was done. Asked again under the same key, it goes on.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import kubernetes
import urllib3
from kubernetes.client.exceptions import ApiException

from keepstep.core.clock import Clock, SystemClock
from keepstep.pools.kubernetes import marks
from keepstep.pools.kubernetes.marks import Answer, Repair

_LOOK_S = 2.0
_CALL_S = 10.0
_UNMARK_S = 10.0  # is kept of the time that there is
_CONFLICT, _AGAIN = 409, {408, 409, 429}


class Repairing:
    """One repair of one node."""

    def __init__(self, api: Any, node: str, repair: Repair, clock: Clock, within_s: float) -> None:
        self._api, self._node, self._repair, self._clock = api, node, repair, clock
        self._deadline = clock.monotonic() + within_s

    def run(self) -> Answer:
        """Errors: ApiException where Kubernetes refuses: no such node, or no right to change it."""
        self._insist(self._mark)
        if self._repair.action == "replace":
            return Answer(done=True, text=f"node {self._node} is marked to be replaced")
        left_s = self._deadline - self._clock.monotonic()
        waits_until = self._deadline - min(_UNMARK_S, left_s / 2)
        answer = None
        while answer is None and self._clock.monotonic() < waits_until:
            time.sleep(_LOOK_S)
            answer = self._insist(lambda: marks.answer(self._read()))
        nobody = f"nobody did it: {marks.CONDITION} of node {self._node} still stands"
        answer = answer or Answer(done=False, text=nobody)
        self._insist(lambda: self._clear(answer))
        return answer

    def _mark(self) -> None:
        node = self._read()
        if marks.marked(node, self._repair):
            return
        self._api.patch_node_status(
            self._node, marks.wanted(self._repair, self._at()), _request_timeout=_CALL_S
        )
        event = marks.event(node, self._repair, self._at())
        try:
            self._api.create_namespaced_event(event["metadata"]["namespace"], event, _request_timeout=_CALL_S)
        except ApiException as refused:
            if refused.status != _CONFLICT:
                raise
        self._patch(marks.marks(self._read(), self._repair))

    def _clear(self, answer: Answer) -> None:
        self._api.patch_node_status(self._node, marks.over(answer, self._at()), _request_timeout=_CALL_S)
        self._patch(marks.unmarked(self._read()))

    def _read(self) -> dict[str, Any]:
        found = self._api.read_node(self._node, _request_timeout=_CALL_S)
        return dict(self._api.api_client.sanitize_for_serialization(found))

    def _patch(self, patch: dict[str, Any]) -> None:
        self._api.patch_node(self._node, patch, _request_timeout=_CALL_S)

    def _insist(self, ask: Callable[[], Any]) -> Any:
        """Until it was answered. Errors: ApiException for what does not go away, or when the time is over."""
        while True:
            try:
                return ask()
            except (ApiException, urllib3.exceptions.HTTPError) as problem:
                status = getattr(problem, "status", None) or 0
                passing = status in _AGAIN or status >= 500 or not status
                if not passing or self._clock.monotonic() > self._deadline - _LOOK_S:
                    raise
                time.sleep(_LOOK_S / 4)

    def _at(self) -> str:
        return datetime.fromtimestamp(self._clock.wall(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_args(arguments)
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        kubernetes.config.load_incluster_config()
    else:
        kubernetes.config.load_kube_config()
    repair = Repair(key=asked.key, action=asked.action, reason=asked.reason)
    api = kubernetes.client.CoreV1Api()
    try:
        answer = Repairing(api, asked.node, repair, SystemClock(), asked.within).run()
    except ApiException as refused:
        _say(f"Kubernetes refuses: HTTP {refused.status} {refused.reason} for node {asked.node}")
        return 1
    except urllib3.exceptions.HTTPError as problem:
        _say(f"Kubernetes cannot be reached: {problem}")
        return 1
    _say(answer.text)
    return 0 if answer.done else 1


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("node", "key", "reason"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--action", required=True, choices=("reset", "reboot", "replace"))
    parser.add_argument("--within", type=float, required=True, help="seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
