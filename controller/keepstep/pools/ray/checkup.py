"""What is usually wrong with a cluster: `python -m keepstep.pools.ray.checkup ADDRESS RESOURCE URL`.

A process of its own, for `keepstep doctor --pool ray`. It asks each node that jobs could use, and prints one
JSON list of findings.
"""

import json
import os
import platform
import shutil
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from keepstep.pools.ray.driver import connect

_ANSWER_WITHIN_S = 60.0
_REACH_WITHIN_S = 5.0
_SHM_BYTES_MIN = 1 << 30
_LISTED_MAX = 6

Finding = dict[str, str]


def look(url: str) -> dict[str, Any]:
    """On a node: what it has."""
    try:
        ours = version("keepstep")
    except PackageNotFoundError:
        ours = "none"
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "ray": ray.__version__,
        "keepstep": ours,
        "shm": shutil.disk_usage("/dev/shm").free,  # noqa: S108 - what NCCL and data loaders use
        "unreachable": _unreachable(url),
    }


def _unreachable(url: str) -> str:
    where = urlsplit(url)
    if not where.hostname:
        return ""
    try:
        socket.create_connection((where.hostname, where.port or 80), _REACH_WITHIN_S).close()
    except OSError as problem:
        return str(problem)
    return ""


def findings(address: str, resource: str, url: str) -> list[Finding]:
    try:
        connect(address)
    except (RuntimeError, OSError, ray.exceptions.RayError) as problem:
        return [_finding("ray cluster", "failed", f"{address}: {str(problem).strip().splitlines()[0]}")]
    nodes = [node for node in ray.nodes() if node["Alive"]]
    fit = [node for node in nodes if node["Resources"].get(resource, 0) >= 1]
    told = [_finding("ray cluster", "ready", f"{address}, Ray {ray.__version__}, {len(nodes)} nodes")]
    slots = sum(int(node["Resources"][resource]) for node in fit)
    if not fit:
        kinds = {kind for node in nodes for kind in node["Resources"] if ":" not in kind}
        declared = ", ".join(sorted(kinds - {"memory", "object_store_memory"})) or "nothing"
        text = f"no node declares {resource}; they declare {declared} (ray start --num-gpus, --resources)"
        return [*told, _finding("ray resources", "failed", text)]
    told.append(_finding("ray resources", "ready", f"{slots} {resource} on {len(fit)} nodes"))
    return told + _of_nodes(fit, url)


def _of_nodes(nodes: list[dict[str, Any]], url: str) -> list[Finding]:
    asked = {}
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[node["NodeName"]] = ray.remote(num_cpus=0, scheduling_strategy=where, max_retries=0)(
            look
        ).remote(url)
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_WITHIN_S)
    here = look("")
    differ, small, apart, silent = [], [], [], []
    for name, answer in asked.items():
        try:
            found = ray.get(answer, timeout=0) if answer in done else None
        except ray.exceptions.RayError as problem:
            differ.append(f"{name}: {str(problem).strip().splitlines()[-1]}")
            continue
        if found is None:
            silent.append(name)
            continue
        others = [f"{key} {found[key]}" for key in ("python", "ray", "keepstep") if found[key] != here[key]]
        differ += [f"{name} has {', '.join(others)}"] if others else []
        small += [f"{name} {found['shm'] >> 20} MiB"] if found["shm"] < _SHM_BYTES_MIN else []
        apart += [f"{name}: {found['unreachable']}"] if found["unreachable"] else []
    same = f"Python {here['python']}, Ray {here['ray']}, keepstep {here['keepstep']}"
    told = [_judged("ray versions", differ, f"{same} everywhere", f"here {same}", "failed")]
    told.append(_judged("ray /dev/shm", small, "1 GiB free or more everywhere", "little is free", "silent"))
    if url:
        told.append(
            _judged("ray to controller", apart, f"all reach {url}", f"{url} is not reached", "failed")
        )
    if silent:
        text = f"no answer within {_ANSWER_WITHIN_S:g} s: {_listed(silent)}"
        told.append(_finding("ray nodes", "failed", text))
    return told


def _judged(what: str, bad: list[str], good: str, otherwise: str, state: str) -> Finding:
    return _finding(what, state, f"{otherwise}; {_listed(bad)}") if bad else _finding(what, "ready", good)


def _finding(what: str, state: str, told: str) -> Finding:
    return {"what": what, "state": state, "told": told}


def _listed(found: list[str]) -> str:
    more = f" and {len(found) - _LISTED_MAX} more" if len(found) > _LISTED_MAX else ""
    return "; ".join(found[:_LISTED_MAX]) + more


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints is no finding
    json.dump(findings(*sys.argv[1:4]), out)
    out.flush()


if __name__ == "__main__":
    main()
