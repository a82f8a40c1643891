"""What watching a node's health costs, with eight GPUs that a stand-in for NVML plays (tests/native).

    .venv/bin/python tests/bench/probe.py

`pass_cpu_ms` is one look at everything of all eight, CPU time, the median; `agent_core_share` what agent and
sampling process take of a core while they report once a second; `agent_mib` their memory, each with its share
of what they share. Then one GPU's driver call hangs for ever: how often the other seven are sampled from then
on, and the longest time that they were not. The last line is one JSON object.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from agents import Agent, Controller, controlled, until
from keepstep.agent.rank import processes
from nvml_standin import Standin

PASSES, WATCHED_S, HUNG_S = 20, 30.0, 20.0
HUNG = 5
TICK_HZ = os.sysconf("SC_CLK_TCK")


def passes() -> None:
    """In a process whose loader finds the stand-in: CPU milliseconds of full passes, as JSON."""
    from keepstep.agent.probes.gpu import nvml
    from keepstep.agent.probes.gpu.__main__ import Output, Passes
    from keepstep.agent.probes.gpu.catalogue import Tier
    from keepstep.agent.probes.gpu.page import Page
    from keepstep.agent.probes.gpu.reading import Order
    from keepstep.core.clock import SystemClock

    page, clock = Page.made(), SystemClock()
    nvml.start(page, clock)
    gpus, _ = nvml.opened(Order(parent=0, page=0), page, clock)
    with Path(os.devnull).open("wb") as nowhere:
        took = []
        output = Output(nowhere.fileno())
        looks = Passes(gpus, page, output, clock)
        for _ in range(PASSES):
            looks.due = dict.fromkeys(Tier, 0.0)
            began = time.thread_time()
            output.write(looks.once())
            took.append(1e3 * (time.thread_time() - began))
            time.sleep(0.12)  # GPM samples want to be apart
        print(json.dumps(took))


async def watched(folder: Path, standin: Standin) -> dict[str, float]:
    log = folder / "kmsg"
    log.touch()
    async with controlled(folder, "--kernel-log", str(log), start=False, env=standin.env) as (
        controller,
        agent,
    ):
        controller.state_every_s = 1.0
        agent.start()
        await until(lambda: controller.states and controller.states[-1].health.gpus, agent.said)  # type: ignore[union-attr]
        await asyncio.sleep(3.0)  # past its start
        began, spent_s = time.monotonic(), cpu_s(agent)
        await asyncio.sleep(WATCHED_S)
        share = (cpu_s(agent) - spent_s) / (time.monotonic() - began)
        memory = sum(processes.pss_bytes(pid) for pid in family(agent)) / (1 << 20)
        return {"agent_core_share": share, "agent_mib": memory, **await hung(controller, standin)}


async def hung(controller: Controller, standin: Standin) -> dict[str, float]:
    sampled: dict[int, list[float]] = {}
    standin.hang(HUNG)
    began = time.monotonic()
    seen = 0
    while (now := time.monotonic()) < began + HUNG_S:
        state = controller.states[-1]
        if state.sequence != seen and state.health is not None:
            seen = state.sequence
            for gpu in state.health.gpus:
                times = sampled.setdefault(gpu.index, [])
                if not times or now - gpu.age_s - times[-1] > 0.5:  # else it is the same sample
                    times.append(now - gpu.age_s)
        await asyncio.sleep(0.01)
    others = [times for index, times in sampled.items() if index != HUNG]
    after = [[each for each in times if each > began + HUNG_S / 2] for times in others]
    gaps = [b - a for times in others for a, b in pairwise(times)]
    return {
        "hung_others_hz": min((len(times) - 1) / (times[-1] - times[0]) for times in after),
        "hung_gap_s": max(gaps),
        "hung_others": len(others),
    }


def family(agent: Agent) -> list[int]:
    found = processes.descendants(agent.pid, processes.table())
    return [agent.pid, *(process.pid for process in found if process.alive)]


def cpu_s(agent: Agent) -> float:
    """Of it and all that it started, ended ones included."""
    ticks = 0
    for pid in family(agent):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(fields[k]) for k in (11, 12, 13, 14))
    return ticks / TICK_HZ


def main() -> None:
    if sys.argv[1:] == ["passes"]:
        passes()
        return
    with tempfile.TemporaryDirectory() as folder:
        standin = Standin(Path(folder) / "nvml")
        took = subprocess.run(
            [sys.executable, __file__, "passes"], env={**os.environ, **standin.env}, check=True,
            capture_output=True, timeout=120,
        ).stdout  # fmt: skip
        figures = {"pass_cpu_ms": statistics.median(json.loads(took))}
        figures |= asyncio.run(watched(Path(folder), standin))
    rounded = {name: float(f"{value:.3g}") for name, value in figures.items()}
    context = {"load": round(os.getloadavg()[0], 1), "gpus": 8}
    print(json.dumps({"bench": "probe", "figures": rounded, "context": context}))


if __name__ == "__main__":
    main()
