"""Gangs over two agents: a shipped script that talks over gloo, and the built-in trainer."""

import asyncio
import json
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agents import JOB, Agent, Controller, controlled, going, launch_of, lives, until
from keepstep.spec import load, to_dict
from keepstep.spec.bundle import pack
from keepstep.wire import messages as wire
from shims import members
from specs import TINY

GLOO = """
import os, sys
import torch, torch.distributed as dist
import helper
dist.init_process_group("gloo")
total = torch.tensor([float(os.environ["RANK"])])
dist.all_reduce(total)
print("sum", int(total), "of", dist.get_world_size(), helper.WORD, os.getcwd(), flush=True)
dist.destroy_process_group()
"""

FORGETFUL = ("--standby-linger", "0")  # a server ends with its last job
Nodes = list[tuple[Controller, Agent]]


async def two_nodes(stack: AsyncExitStack, folder: Path) -> Nodes:
    return [
        await stack.enter_async_context(controlled(folder / name, *FORGETFUL, node=name))
        for name in ("a", "b")
    ]


async def gang(nodes: Nodes, launch: wire.Launch) -> None:
    """Prepared everywhere, then started everywhere, as the controller does it."""
    parts = [
        msgspec.structs.replace(launch, nodes=("a", "b"), node_rank=k, ranks=(2 * k, 2 * k + 1))
        for k in (0, 1)
    ]
    for (controller, _), part in zip(nodes, parts, strict=True):
        await controller.want(part)
    prepared = [await c.phase("prepared", launch.attempt, launch.job, within_s=240) for c, _ in nodes]
    assert prepared[1].master is None
    for (controller, _), part in zip(nodes, parts, strict=True):
        await controller.want(msgspec.structs.replace(part, go=True, master=prepared[0].master))


@pytest.mark.slow
def test_a_shipped_script_over_two_nodes_starts_warm(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "script.py").write_text(GLOO)
    (work / "helper.py").write_text("WORD = 'shipped'\n")
    bundle = pack(work)

    async def play() -> None:
        async with AsyncExitStack() as stack:
            nodes = await two_nodes(stack, tmp_path)
            for controller, _ in nodes:
                controller.bundles[bundle.sha256] = bundle.data
            run = {"ship": "bundle", "bundle": bundle.sha256, "workdir": "/elsewhere", "warm": "auto"}
            launch = launch_of(tmp_path / "unused", "", ranks=4, run=run)
            try:
                await gang(nodes, launch)
                for k, (controller, agent) in enumerate(nodes):
                    dead = await controller.phase("dead")
                    assert [(r.rank, r.exit_code) for r in dead.ranks] == [(2 * k, 0), (2 * k + 1, 0)], dead
                    assert dead.warm, dead.cold_reason
                    answer = await controller.ask("logs", job=JOB)
                    here = str(agent.folder / "jobs" / JOB)
                    for _, line in answer.data["lines"]:
                        assert line.startswith(f"sum 6 of 4 shipped {here}/workdir-")
                    assert [(s.job, s.state) for s in controller.states[-1].standbys] == [(JOB, "ready")]
                    assert answer.data["end"]
            finally:
                await _end_standbys(nodes)

    asyncio.run(play())


@pytest.mark.slow
def test_processes_that_were_started_ahead_become_each_attempts_ranks(tmp_path: Path) -> None:
    """As on GPUs: what was used is replaced at once, and the next attempt is as warm as the first."""

    async def play() -> None:
        async with controlled(tmp_path, "--standby", "processes", "--slots", "2", *FORGETFUL) as (
            controller,
            agent,
        ):
            (tmp_path / "work").mkdir()
            (tmp_path / "work" / "helper.py").write_text("WORD = 'ahead'\n")
            try:
                for attempt in (1, 2):
                    launch = launch_of(tmp_path / "work", GLOO, attempt=attempt, run={"warm": "auto"})
                    await controller.want(launch)
                    prepared = await controller.phase("prepared", attempt, within_s=240)  # torch, three times
                    await controller.want(going(launch, prepared))
                    dead = await controller.phase("dead", attempt)
                    assert [rank.exit_code for rank in dead.ranks] == [0, 0], dead
                    assert dead.warm, dead.cold_reason
                    log = agent.folder / "jobs" / JOB / str(attempt) / "rank-0.log"
                    assert log.read_text().startswith("sum 1 of 2 ahead")
                    [standby] = controller.states[-1].standbys
                    assert standby.memory_bytes > 100 << 20  # of all that wait
            finally:
                await _end_standbys([(controller, agent)])

    asyncio.run(play())


@pytest.mark.slow
def test_the_trainer_leaves_its_lineage_and_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    spec = load(TINY, base_dir=tmp_path)
    checkpoints = tmp_path / "checkpoints" / JOB
    document: dict[str, Any] = to_dict(spec)
    common: dict[str, Any] = {
        "job": JOB, "world_size": 4, "run": document["run"], "replicas": 2,
        "layout": {"dp": 2, "pp": 1, "cp": 1, "tp": 2}, "nodes": ("a", "b"), "node_rank": 0, "ranks": (),
        "checkpoint": {**document["checkpoint"], "dir": str(checkpoints)}, "self_fence_s": None,
    }  # fmt: skip

    async def play() -> None:
        async with AsyncExitStack() as stack:
            nodes = await two_nodes(stack, tmp_path)
            try:
                await gang(nodes, wire.Launch(attempt=1, lineage=((1, 0, 0),), **common))
                for controller, _ in nodes:
                    await controller.phase("running")
                (first, _), (second, _) = nodes
                await until(lambda: _checkpointed(first) >= 10, lambda: str(first.attempt()))
                victim = second.attempt()
                assert victim is not None
                os.kill(victim.ranks[0].pid, signal.SIGKILL)
                await until(lambda: any(r.signal == 9 for r in (second.attempt() or victim).ranks))
                for controller, _ in nodes:
                    await controller.want(stops=(wire.Stop(job=JOB, attempt=1, reason="rank 2 was killed"),))
                for controller, _ in nodes:
                    await controller.phase("dead")

                answer = await second.ask("inventory", dir=str(checkpoints))
                step = max(step for _, step, whole in answer.data["checkpoints"] if whole)
                assert step >= 10 and answer.data["fence"] == 1

                again = wire.Launch(attempt=2, restore=(1, step), lineage=((1, 0, 0), (2, 1, step)), **common)
                await gang(nodes, again)
                for controller, _ in nodes:
                    dead = await controller.phase("dead", 2)
                    assert [rank.exit_code for rank in dead.ranks] == [0, 0], dead
                    assert {rank.step for rank in dead.ranks} == {60}
                    assert dead.warm, dead.cold_reason
                assert json.loads((checkpoints / "fence.json").read_text()) == {"attempt": 2}
                lineage = json.loads((checkpoints / "lineage" / "attempt-0002.json").read_text())
                assert lineage["parent"] == {"attempt": 1, "step": step}

                def steps() -> set[int]:
                    told = [e for c, _ in nodes for e in c.events if e.attempt == 2]
                    return {point[0] for e in told for point in e.data.get("points", ())}

                await until(lambda: steps() >= set(range(step + 1, 61)), lambda: str(sorted(steps())))
            finally:
                await _end_standbys(nodes)

    asyncio.run(play())


def _checkpointed(controller: Controller) -> int:
    status = controller.attempt()
    return max((rank.checkpoint_step for rank in status.ranks), default=-1) if status else -1


async def _end_standbys(nodes: Nodes) -> None:
    """They go with the job: forgotten by the controller, their servers are ended."""
    pids = [
        json.loads(path.read_bytes())["pid"]
        for _, agent in nodes
        for path in agent.folder.glob("standby/*/standby.json")
    ]
    for controller, agent in nodes:
        if agent.running and controller.registers:
            known = [(a.job, a.attempt) for a in controller.states[-1].attempts]
            await controller.want(stops=tuple(wire.Stop(job=j, attempt=n) for j, n in known))
            for job, number in known:
                await until(lambda j=job, n=number: not members(f"{j}/{n}/a"))  # type: ignore[misc]
                await controller.want(forget=((job, number),))
    await until(lambda: not any(lives(pid) for pid in pids))
