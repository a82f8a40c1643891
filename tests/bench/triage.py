"""From a line in the kernel's log to a decision in the controller, and what a flood of lines costs both.

    .venv/bin/python tests/bench/triage.py [--flood SECONDS] [--lines 1000000]

A real controller, a real agent, eight GPUs of a stand-in for NVML, a file as the kernel's log.
`xid_to_decision_s` is the time from the line to the moment at which its decision is in the store, the longest
of sixteen. `flood_core_share` is what agent and controller together take of a core while a million lines of
XID 45 come within a minute, over what they take without; `flood_changes` is what that changed: nothing, so
its agent is not silent meanwhile either. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from keepstep.agent.rank import processes
from machines import Machines

GPUS, NODE, CODES, IDLE_S, BATCHES_HZ = 8, "g1", (31, 13), 15.0, 20
TICK_HZ = os.sysconf("SC_CLK_TCK")
POLICY = """
rules:
  - {name: each GPU apart, xid: [13], class: application, actions: [restart the application]}
"""


def decisions(machines: Machines) -> list[float]:
    """When each was stored, by the wall clock of this machine."""
    return [event["at"] for event in machines.history(NODE) if event["kind"] == "node found"]


def latencies(machines: Machines) -> list[float]:
    took = []
    for code in CODES:
        for gpu in range(GPUS):
            known = len(decisions(machines))
            written = time.time()
            machines.xid(NODE, code, gpu)
            machines.cluster.until(lambda known=known: len(decisions(machines)) > known, "the decision")  # type: ignore[misc]
            took.append(decisions(machines)[-1] - written)
            time.sleep(0.37)  # not in step with reports
    return took


def cpu_s(machines: Machines) -> dict[str, float]:
    """Of the agent with its sampler, and of the controller; ended children included."""
    agent = machines.agents[NODE].pid
    found = processes.descendants(agent, processes.table())
    groups = {
        "agent": [agent, *(process.pid for process in found if process.alive)],
        "controller": [machines.cluster.running.pid],
    }
    return {name: sum(map(_ticks, pids)) / TICK_HZ for name, pids in groups.items()}


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(fields[k]) for k in (11, 12, 13, 14))


def spent(machines: Machines, seconds: float, lines: int = 0) -> dict[str, float]:
    """Shares of a core over so long, while so many lines come evenly."""
    before, began = cpu_s(machines), time.monotonic()
    batches = int(seconds * BATCHES_HZ)
    for number in range(batches):
        machines.xid(NODE, 45, times=lines * (number + 1) // batches - lines * number // batches)
        time.sleep(max(0.0, began + (number + 1) / BATCHES_HZ - time.monotonic()))
    took_s = time.monotonic() - began
    return {name: (cpu - before[name]) / took_s for name, cpu in cpu_s(machines).items()}


def caught_up(machines: Machines, lines: int) -> float:
    """Seconds until all of them were reported as counted."""
    began = time.monotonic()

    def counted() -> bool:
        told = [fault["count"] for fault in machines.node(NODE)["health"]["faults"] if fault["code"] == 45]
        return told == [lines]

    machines.cluster.until(counted, "all lines to be counted")
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flood", type=float, default=60.0)
    parser.add_argument("--lines", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        machines = Machines(Path(folder), NODE, gpus=GPUS, policy=POLICY)
        try:
            time.sleep(5.0)  # past its start
            took = latencies(machines)
            idle = spent(machines, IDLE_S)
            before = machines.history(NODE)
            began = time.monotonic()
            flood = spent(machines, options.flood, options.lines)
            flood_s = time.monotonic() - began
            behind_s = caught_up(machines, options.lines)
            changed = [f"{e['kind']}: {e['text']}" for e in machines.history(NODE)[len(before) :]]
            life = machines.node(NODE)["life"]
        finally:
            machines.close()
    share = sum(flood.values()) - sum(idle.values())
    figures = {
        "xid_to_decision_s": max(took), "xid_to_decision_s_median": statistics.median(took),
        "flood_core_share": share,
        "flood_changes": len(changed) + (life != "healthy"),
    }  # fmt: skip
    context = {
        "load": round(os.getloadavg()[0], 1), "flood_s": round(flood_s, 1), "lines": options.lines,
        "counted_after_s": round(behind_s, 1), "changed": changed[:5], "idle": idle, "flood": flood,
    }  # fmt: skip
    rounded = {name: float(f"{value:.3g}") for name, value in figures.items()}
    print(json.dumps({"bench": "triage", "figures": rounded, "context": context}))


if __name__ == "__main__":
    main()
