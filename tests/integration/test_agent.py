"""A real agent, real shims and real ranks, with a controller that only says what the test wants said."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest

from agents import JOB, Agent, Controller, controlled, going, launch_of, lives, until
from keepstep.wire import messages as wire
from shims import left_of, members

STEPPING = """
import os, sys, time
from keepstep.session import current
session = current()
for step in range(1, 10_000):
    time.sleep(0.02)
    session.step_done(step, loss=1.0 / step)
    print("step", step, flush=True)
"""
WAITING = "import time\nprint('here', flush=True)\ntime.sleep(600)\n"


def test_an_attempt_runs_to_its_end(tmp_path: Path) -> None:
    script = (
        "import os\nfor name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'TORCHELASTIC_RUN_ID'):\n"
        "    print(name, os.environ[name])\n"
    )

    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            register = controller.registers[0]
            assert (register.node, register.slots, register.protocol) == ("a", 8, wire.PROTOCOL)
            launch = launch_of(tmp_path / "work", script)
            await controller.want(launch)
            prepared = await controller.phase("prepared")
            assert prepared.master is not None and prepared.master[0] == "127.0.0.1"
            assert [rank.state for rank in prepared.ranks] == ["waiting", "waiting"]

            await controller.want(going(launch, prepared))
            dead = await controller.phase("dead")
            assert [(r.rank, r.state, r.exit_code) for r in dead.ranks] == [
                (0, "exited", 0),
                (1, "exited", 0),
            ]
            assert dead.alive == 0
            answer = await controller.ask("logs", job=JOB, tail=100)
            lines = [line for rank, line in answer.data["lines"] if rank == 1]
            assert lines == [
                "RANK 1", "WORLD_SIZE 2", "LOCAL_RANK 1", "MASTER_ADDR 127.0.0.1",
                f"TORCHELASTIC_RUN_ID {JOB}",
            ]  # fmt: skip

            # Forgotten, it is not reported any more; and still it never starts again.
            await controller.want(going(launch, prepared), forget=((JOB, 1),))
            await until(lambda: controller.attempt() is None)
            await controller.want(going(launch, prepared))
            again = await controller.phase("dead")
            assert (agent.folder / "jobs" / JOB / "1" / "rank-0.log").exists()
            assert again.phase == "dead"

    asyncio.run(play())


def test_a_crash_comes_with_its_evidence(tmp_path: Path) -> None:
    script = """
import json, os, sys, time
if os.environ["RANK"] == "1":
    json.dump({"message": {"message": "ValueError: broken on purpose", "extraInfo": {}}},
              open(os.environ["TORCHELASTIC_ERROR_FILE"], "w"))
    print("about to break", flush=True)
    sys.exit(3)
time.sleep(600)
"""

    async def play() -> None:
        async with controlled(tmp_path) as (controller, _):
            await controller.started(launch_of(tmp_path / "work", script))

            def failed() -> bool:
                status = controller.attempt()
                return status is not None and status.ranks[1].state == "exited"

            await until(failed)
            status = controller.attempt()
            assert status is not None
            first, culprit = status.ranks
            assert (culprit.exit_code, culprit.signal, culprit.exit_order) == (3, None, 1)
            assert culprit.error == "ValueError: broken on purpose"
            assert culprit.last_lines == ("about to break",)
            assert culprit.exited_age_s is not None and culprit.exited_age_s < 30
            assert first.state == "running"  # whether the others end is the controller's decision

            os.kill(first.pid, signal.SIGSEGV)
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1, reason="a rank crashed"),))
            dead = await controller.phase("dead")
            assert dead.ranks[1].error == "ValueError: broken on purpose"
            assert dead.ranks[0].signal in {signal.SIGSEGV, signal.SIGKILL}
            assert left_of(f"{JOB}/1/a") == []
            await until(lambda: controller.kinds().count("rank_exited") >= 2)

    asyncio.run(play())


def test_a_stop_gives_grace_and_a_sharper_one_takes_it_back(tmp_path: Path) -> None:
    script = (
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
        + WAITING
    )

    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            running = await controller.started(launch_of(tmp_path / "work", script))
            log = agent.folder / "jobs" / JOB / "1" / "rank-0.log"
            await until(lambda: log.exists() and "here" in log.read_text())
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1, reason="cancelled", grace_s=300.0),))
            await until(lambda: "asked" in log.read_text())
            assert lives(running.ranks[0].pid)
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1, reason="cancelled"),))
            dead = await controller.phase("dead")
            assert dead.reason == "cancelled"
            assert dead.ranks[0].signal == signal.SIGKILL

            # What never was is confirmed, too, and cannot start afterwards.
            await controller.want(stops=(wire.Stop(job=JOB, attempt=2),))
            await controller.phase("dead", 2)
            await controller.want(launch_of(tmp_path / "work", WAITING, attempt=2))
            await controller.want(launch_of(tmp_path / "work", WAITING, attempt=3))
            await controller.phase("prepared", 3)
            status = controller.attempt(2)
            assert status is not None and status.phase == "dead"
            await controller.want(stops=(wire.Stop(job=JOB, attempt=3),))
            await controller.phase("dead", 3)

    asyncio.run(play())


def test_a_stop_while_it_prepares_leaves_nothing(tmp_path: Path) -> None:
    run = {"ship": "bundle", "bundle": "0" * 64, "secrets": {"S": {"source": "env", "name": "HOME"}}}

    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            controller.holding = True
            await controller.want(launch_of(tmp_path / "work", WAITING, run=run))
            await until(lambda: "files" in getattr(controller.attempt(), "reason", ""))
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1, reason="cancelled"),))
            dead = await controller.phase("dead")
            assert (dead.reason, {rank.state for rank in dead.ranks}) == ("cancelled", {"waiting"})
            assert not (agent.folder / "jobs" / JOB / "1" / "launch.json").exists()
            assert "orphans" not in controller.kinds()

    asyncio.run(play())


def test_what_a_node_cannot_do_is_refused_with_a_reason(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, _):
            await controller.want(
                launch_of(
                    tmp_path / "work", WAITING, job="no-script", run={"command": ["python", "none.py"]}
                ),
                launch_of(tmp_path / "work", WAITING, job="no-command", run={"command": ["nosuchcommand"]}),
                launch_of(tmp_path / "work", WAITING, job="no-folder", run={"workdir": "/no/such/folder"}),
                launch_of(tmp_path / "work", WAITING, job="no-user", run={"user": "nobody-we-know"}),
                launch_of(
                    tmp_path / "work", WAITING, job="no-secret",
                    run={"secrets": {"KEY": {"source": "env", "name": "NOT_SET_HERE", "key": None}}},
                ),
                launch_of(
                    tmp_path / "work", WAITING, job="no-bundle", run={"ship": "bundle", "bundle": "0" * 64}
                ),
                launch_of(tmp_path / "work", WAITING, job="no-sense", run={"kind": "dance"}),
                launch_of(tmp_path / "work", WAITING, job="../../escape"),
            )  # fmt: skip
            for job, word in {
                "no-script": "none.py", "no-command": "nosuchcommand", "no-folder": "/no/such/folder",
                "no-user": "nobody-we-know", "no-secret": "NOT_SET_HERE", "no-sense": "dance",
                "no-bundle": "404",
            }.items():  # fmt: skip
                assert word in (await controller.phase("refused", job=job)).reason
            assert not (tmp_path / "escape").exists()

    asyncio.run(play())


def test_a_killed_agent_is_replaced_without_a_lost_step(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            running = await controller.started(launch_of(tmp_path / "work", STEPPING))
            await until(lambda: _steps(controller) > 5)
            await agent.kill()
            before = _steps(controller)
            log = agent.folder / "jobs" / JOB / "1" / "rank-0.log"
            await until(lambda: len(log.read_text().splitlines()) > before + 20)  # it trains on

            agent.start()
            await until(lambda: len(controller.registers) == 2)
            state = controller.registers[1].state
            assert state is not None
            assert [r.pid for r in state.attempts[0].ranks] == [r.pid for r in running.ranks]
            assert state.attempts[0].phase == "running"
            assert min(r.step for r in state.attempts[0].ranks) > before
            steps = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("step")]
            assert steps == list(range(1, len(steps) + 1))
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1),))
            await controller.phase("dead")

    asyncio.run(play())


def test_an_end_that_no_agent_saw_is_reported_by_the_next(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            running = await controller.started(launch_of(tmp_path / "work", WAITING))
            await agent.kill()
            for rank in running.ranks:
                os.kill(rank.pid, signal.SIGUSR1)
            await until(lambda: not any(lives(rank.pid) for rank in running.ranks))
            agent.start()
            dead = await controller.phase("dead")
            assert [rank.signal for rank in dead.ranks] == [signal.SIGUSR1] * 2

            await agent.kill()  # and its outcome is known to every later agent
            controller.states.clear()
            agent.start()
            again = await controller.phase("dead")
            assert [rank.signal for rank in again.ranks] == [signal.SIGUSR1] * 2

    asyncio.run(play())


def test_a_killed_shim_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import os, subprocess, time\nsubprocess.Popen(['sleep', '600'], start_new_session=True)\n" + WAITING
    )

    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            await controller.started(launch_of(tmp_path / "work", script, ranks=1))
            await until(lambda: len(members(f"{JOB}/1/a")) >= 3)  # shim, rank, its child
            shim = int(
                (agent.folder / "jobs" / JOB / "1" / "shim.json")
                .read_text()
                .split('"pid": ')[1]
                .split(",")[0]
            )
            os.kill(shim, signal.SIGKILL)
            dead = await controller.phase("dead")
            assert dead.alive == 0 and dead.ranks[0].state == "exited"
            assert left_of(f"{JOB}/1/a") == []
            await until(lambda: "orphans" in controller.kinds())

    asyncio.run(play())


def test_older_terms_and_other_instances_are_refused(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            launch = launch_of(tmp_path / "work", WAITING)
            await controller.send(wire.Desired(term=2, instance=controller.instance, launches=(launch,)))
            await controller.send(wire.Desired(term=3, instance="somebody-else", launches=(launch,)))
            await controller.send(wire.Query(id=99, kind="logs", term=2, params={"job": JOB}))
            await until(lambda: agent.said().count("refused:") == 3)
            assert controller.attempt() is None and 99 not in controller.answers

            # A newer term is believed, and remembered by the next agent.
            await controller.send(wire.Desired(term=7, instance=controller.instance))
            await until(
                lambda: (
                    (agent.folder / "term.json").exists() and "7" in (agent.folder / "term.json").read_text()
                )
            )
            await agent.kill()
            agent.start()
            await until(lambda: "its term 3 is older than 7" in agent.said())
            controller.term = 7
            seen = len(controller.states)
            await until(lambda: len(controller.states) > seen + 3)

    asyncio.run(play())


def test_events_arrive_exactly_once_whatever_the_connection_does(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            await controller.started(launch_of(tmp_path / "work", STEPPING, ranks=1))
            await until(lambda: controller.kinds().count("points") >= 2)
            await controller.close()
            log = agent.folder / "jobs" / JOB / "1" / "rank-0.log"
            seen = len(log.read_text().splitlines())
            await until(
                lambda: len(log.read_text().splitlines()) > seen + 60
            )  # longer than the beacon's ring
            await agent.kill()
            agent.start()
            await asyncio.sleep(0)
            await controller.open()  # on another port
            await until(lambda: len(controller.registers) >= 2)
            last = controller.events[-1].number
            await until(lambda: controller.events[-1].number > last + 3)
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1),))
            await controller.phase("dead")
            await until(lambda: "rank_exited" in controller.kinds())

            numbers = [event.number for event in controller.events]
            assert numbers == list(range(1, len(numbers) + 1))
            points = [point for event in controller.events for point in event.data.get("points", ())]
            steps = {point[0] for point in points}  # what the beacon's ring lost while no agent lived is lost
            assert steps >= set(range(1, seen + 40))
            assert all(abs(point[2] - 1.0 / point[0]) < 1e-9 for point in points)

    asyncio.run(play())


def test_what_is_no_message_closes_the_link_and_nothing_else(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            for nonsense in (b"\x93nonsense", b"\x81\xa1t\xa7desired", b"x" * (wire.MAX_MESSAGE_BYTES + 1)):
                seen = len(controller.registers)
                await controller.send(nonsense)
                await until(lambda seen=seen: len(controller.registers) > seen, agent.said)  # type: ignore[misc]
            seen = len(controller.registers)
            await controller.send(msgspec.msgpack.encode({"t": "of a later version", "x": 1}))
            count = len(controller.states)
            await until(lambda: len(controller.states) > count + 3)
            assert len(controller.registers) == seen and agent.running

    asyncio.run(play())


def test_alone_and_still_it_ends_its_ranks_but_stepping_ones_go_on(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, _):
            controller.lease_s = 1.0
            still = launch_of(tmp_path / "still", WAITING, ranks=1, job="still", self_fence_s=2.0)
            steps = launch_of(tmp_path / "steps", STEPPING, ranks=1, job="steps", self_fence_s=2.0)
            tied = launch_of(tmp_path / "tied", WAITING, ranks=1, job="tied", self_fence_s=2.0, attached=True)
            pids = {}
            for launch in (still, steps, tied):
                pids[launch.job] = (await controller.started(launch)).ranks[0].pid
            await controller.close()
            await until(lambda: not lives(pids["still"]))
            assert lives(pids["steps"]) and lives(pids["tied"])
            await controller.open()
            dead = await controller.phase("dead", job="still")
            assert "no controller" in dead.reason
            await until(lambda: "self_fenced" in controller.kinds())
            assert (await controller.phase("running", job="steps")).ranks[0].pid == pids["steps"]
            await controller.want(
                stops=(wire.Stop(job="steps", attempt=1), wire.Stop(job="tied", attempt=1)),
            )
            await controller.phase("dead", job="steps")
            await controller.phase("dead", job="tied")

    asyncio.run(play())


@pytest.mark.parametrize("attached", [False, True])
def test_an_agent_that_leaves(tmp_path: Path, attached: bool) -> None:
    async def play() -> None:
        async with controlled(tmp_path, *(["--attached"] if attached else [])) as (controller, agent):
            running = await controller.started(launch_of(tmp_path / "work", WAITING))
            agent.signal(signal.SIGTERM)
            assert await agent.ended() == 0
            assert controller.states[-1].leaving
            assert lives(running.ranks[0].pid) is not attached
            if attached:
                status = controller.attempt()
                assert status is not None and status.phase == "dead"

    asyncio.run(play())


def test_one_agent_in_a_folder(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            second = Agent(agent.folder, controller.endpoint)
            second.start()
            assert await second.ended() == 4
            assert f"process {agent.pid}" in second.said()

    asyncio.run(play())


def test_credentials_that_will_not_do_end_an_idle_agent(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            await agent.kill()
            controller.refusal = wire.Refusal(what="unknown token", next="Join anew.")
            agent.start()
            assert await agent.ended() == 4
            assert "Join anew." in agent.said()

    asyncio.run(play())


def test_an_agent_is_small(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, _):
            await controller.started(launch_of(tmp_path / "work", STEPPING, ranks=8))
            count = len(controller.states)
            await until(lambda: len(controller.states) > count + 10)
            assert controller.states[-1].node.agent_memory_bytes <= 80 << 20
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1),))
            await controller.phase("dead")

    asyncio.run(play())


def _steps(controller: Controller) -> int:
    status = controller.attempt()
    return min((rank.step for rank in status.ranks), default=-1) if status else -1
