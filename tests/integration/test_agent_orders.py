"""Orders that meet an agent at an awkward moment, commands that are no Python, questions that wait."""

import asyncio
import os
import time
from pathlib import Path

from agents import JOB, controlled, going, launch_of, lives, until
from keepstep.wire import messages as wire
from shims import left_of

WAITING = "import time\nprint('here', flush=True)\ntime.sleep(600)\n"


def test_go_reaches_the_next_agent_of_a_prepared_attempt(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            launch = launch_of(tmp_path / "work", "print('went')\n")
            await controller.want(launch)
            prepared = await controller.phase("prepared")
            await agent.kill()
            agent.start()
            await until(lambda: len(controller.registers) == 2)
            state = controller.registers[1].state
            assert state is not None and state.attempts[0].phase == "prepared"
            assert state.attempts[0].master == prepared.master
            await controller.want(going(launch, prepared))
            dead = await controller.phase("dead")
            assert [rank.exit_code for rank in dead.ranks] == [0, 0]

    asyncio.run(play())


def test_an_agent_killed_while_it_prepares_never_starts_that_attempt(tmp_path: Path) -> None:
    run = {"ship": "bundle", "bundle": "f" * 64}

    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            controller.holding = True
            launch = launch_of(tmp_path / "work", WAITING, run=run)
            await controller.want(launch)
            await until(lambda: "files" in getattr(controller.attempt(), "reason", ""))
            await agent.kill()
            agent.start()
            dead = await controller.phase("dead")
            assert "before anything was started" in dead.reason
            await controller.want(launch)
            seen = len(controller.states)
            await until(lambda: len(controller.states) > seen + 3)
            assert controller.attempt() is not None and (await controller.phase("dead")).alive == 0
            assert left_of(f"{JOB}/1/a") == []

    asyncio.run(play())


def test_the_next_attempt_waits_until_nothing_of_the_last_one_lives(tmp_path: Path) -> None:
    stubborn = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAITING

    async def play() -> None:
        async with controlled(tmp_path) as (controller, _):
            running = await controller.started(launch_of(tmp_path / "work", stubborn, ranks=1))
            said = await controller.ask("logs", job=JOB, wait_s=60.0)
            assert said.data["lines"] == [[0, "here"]]
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1, grace_s=300.0),))
            await controller.want(launch_of(tmp_path / "work", "print('second')\n", ranks=1, attempt=2))
            await until(lambda: "earlier attempt" in getattr(controller.attempt(2), "reason", ""))
            assert lives(running.ranks[0].pid)
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1),))
            await controller.phase("prepared", 2)
            assert not lives(running.ranks[0].pid)
            await controller.want(stops=(wire.Stop(job=JOB, attempt=2),))
            await controller.phase("dead", 2)

    asyncio.run(play())


def test_commands_that_are_no_python(tmp_path: Path) -> None:
    script = 'trap "exit 5" TERM; echo "rank $RANK of $WORLD_SIZE in $PWD"; while :; do sleep 0.05; done'

    async def play() -> None:
        async with controlled(tmp_path) as (controller, _):
            launch = launch_of(tmp_path / "work", "", run={"command": ["sh", "-c", script], "warm": "auto"})
            running = await controller.started(launch)
            assert "no Python" in running.cold_reason
            answer = await controller.ask("logs", job=JOB, ranks=[1], wait_s=30.0)
            assert answer.data["lines"] == [[1, f"rank 1 of 2 in {tmp_path / 'work'}"]]
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1, grace_s=30.0),))
            dead = await controller.phase("dead")
            assert [rank.exit_code for rank in dead.ranks] == [5, 5]

    asyncio.run(play())


def test_a_question_for_more_waits_for_it_and_no_longer(tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = f"""
import os, time
print("first", flush=True)
while not os.path.exists({str(go)!r}):
    time.sleep(0.01)
print("second", flush=True)
time.sleep(600)
"""

    async def play() -> None:
        async with controlled(tmp_path) as (controller, _):
            await controller.started(launch_of(tmp_path / "work", script, ranks=1))
            answer = await controller.ask("logs", job=JOB, wait_s=30.0)
            assert answer.data["lines"] == [[0, "first"]] and not answer.data["end"]
            begin = answer.data["after"]
            waiting = asyncio.create_task(controller.ask("logs", job=JOB, after=begin, wait_s=30.0))
            nothing = await controller.ask("logs", job=JOB, after=answer.data["after"])
            assert nothing.data["lines"] == [] and not waiting.done()
            go.touch()
            more = await waiting
            assert more.data["lines"] == [[0, "second"]]
            found = await controller.ask("logs", job=JOB, grep="^sec")
            assert found.data["lines"] == [[0, "second"]]
            for wrong in ({"job": "no-such-job"}, {"job": "../.."}, {}, {"job": JOB, "grep": "("}):
                assert (await controller.ask("logs", **wrong)).error
            assert "dance" in (await controller.ask("dance")).error
            assert (await controller.ask("inventory", dir="/no/such/folder")).data["checkpoints"] == []
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1),))
            await controller.phase("dead")

    asyncio.run(play())


def test_a_first_step_is_told_at_once(tmp_path: Path) -> None:
    script = """
import time
from keepstep.session import current
session = current()
time.sleep(1)
session.step_done(1)
print(time.monotonic(), flush=True)
time.sleep(600)
"""

    async def play() -> None:
        async with controlled(tmp_path) as (controller, agent):
            controller.state_every_s = 5.0
            await agent.kill()
            agent.start()
            await until(lambda: len(controller.registers) == 2)
            await controller.started(launch_of(tmp_path / "work", script, ranks=1))
            await until(lambda: controller.attempt() and controller.attempt().ranks[0].step == 1)  # type: ignore[union-attr]
            heard = time.monotonic()
            stepped = float((agent.folder / "jobs" / JOB / "1" / "rank-0.log").read_text())
            print("told after", heard - stepped)
            assert heard - stepped < 2.5  # else it came with the next regular report
            await controller.want(stops=(wire.Stop(job=JOB, attempt=1),))
            await controller.phase("dead")

    asyncio.run(play())


def test_a_node_that_only_watches_runs_nothing(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path, "--role", "watch") as (controller, _):
            assert (controller.registers[0].role, controller.registers[0].slots) == ("watch", 0)
            await controller.want(launch_of(tmp_path / "work", WAITING))
            seen = len(controller.states)
            await until(lambda: len(controller.states) > seen + 3)
            assert controller.attempt() is None

    asyncio.run(play())


def test_an_idle_local_agent_does_not_outlive_its_controller(tmp_path: Path) -> None:
    async def play() -> None:
        async with controlled(tmp_path, "--exit-when-orphaned", "1") as (controller, agent):
            running = await controller.started(launch_of(tmp_path / "work", WAITING, self_fence_s=None))
            await controller.close()
            await asyncio.sleep(2.5)  # longer than the bound: with something to look after it stays
            assert agent.running
            os.kill(running.ranks[0].pid, 9)
            os.kill(running.ranks[1].pid, 9)
            assert await agent.ended() == 0

    asyncio.run(play())
