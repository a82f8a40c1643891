"""A real agent process for tests, and a small controller that says to it what the test wants said."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from keepstep.agent.rank import processes
from keepstep.agent.rank.marker import bearers
from keepstep.agent.rank.processes import Process
from keepstep.wire import messages as wire
from shims import ENV, WITHIN_S

TOKEN = "ks_test"  # noqa: S105
JOB = f"job-{secrets.token_hex(2)}"  # its own: another run of these tests on this machine keeps its ranks


class Controller:
    """One WebSocket server. It acknowledges what it hears unless told otherwise, and decides nothing."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.endpoint = folder / "controller.json"
        self.term = 3
        self.lease_s = 30.0
        self.acknowledging = True
        self.holding = False  # bundles are asked for and do not come
        self.state_every_s = 0.2
        self.refusal: wire.Refusal | None = None
        self.registers: list[wire.Register] = []
        self.states: list[wire.State] = []
        self.events: list[wire.Event] = []  # as they arrived, repeats included
        self.acknowledged_event = 0
        self.answers: dict[int, wire.Answer] = {}
        self.bundles: dict[str, bytes] = {}
        self.tokens: list[str] = []
        self._connection: ServerConnection | None = None
        self._server: Any = None
        self._questions = 0

    async def open(self, port: int = 0) -> None:
        self._server = await serve(
            self._talk, "127.0.0.1", port, process_request=self._request, max_size=wire.MAX_MESSAGE_BYTES
        )
        port = self._server.sockets[0].getsockname()[1]
        self.endpoint.write_text(json.dumps({"url": f"http://127.0.0.1:{port}", "token": TOKEN}))

    async def close(self) -> None:
        self._server.close()
        await self._server.wait_closed()
        self._connection = None

    def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        self.tokens.append(request.headers.get("Authorization", ""))
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return connection.respond(HTTPStatus.FORBIDDEN, "no\n")
        if request.path.startswith("/api/v1/bundles/"):
            content = self.bundles.get(request.path.rpartition("/")[2])
            if content is None:
                status = HTTPStatus.SERVICE_UNAVAILABLE if self.holding else HTTPStatus.NOT_FOUND
                return connection.respond(status, "no\n")
            response = connection.respond(HTTPStatus.OK, "")
            del response.headers["Content-Length"]
            response.headers["Content-Length"] = str(len(content))
            response.body = content
            return response
        return None

    async def _talk(self, connection: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            async for data in connection:
                assert isinstance(data, bytes)
                await self._take(connection, wire.decode_from_agent(data))

    async def _take(self, connection: ServerConnection, message: wire.FromAgent | None) -> None:
        match message:
            case wire.Register():
                self.registers.append(message)
                if self.refusal is not None:
                    await connection.send(wire.encode(self.refusal))
                    return
                assert message.state is not None
                self.states.append(message.state)
                self._connection = connection
                welcome = wire.Welcome(
                    protocol=1, version="test", term=self.term, state_every_s=self.state_every_s,
                    lease_s=self.lease_s, acknowledged_event=self.acknowledged_event,
                )  # fmt: skip
                await connection.send(wire.encode(welcome))
            case wire.State():
                self.states.append(message)
                await self._acknowledge(connection, message.sequence)
            case wire.Events():
                self.events += message.events
                if self.acknowledging:
                    self.acknowledged_event = max(self.acknowledged_event, message.events[-1].number)
                await self._acknowledge(connection, 0)
            case wire.Answer():
                self.answers[message.id] = message

    async def _acknowledge(self, connection: ServerConnection, sequence: int) -> None:
        if self.acknowledging:
            ack = wire.Acknowledge(sequence=sequence, event=self.acknowledged_event)
            await connection.send(wire.encode(ack))

    # ---------------------------------------------------------------- what tests say and see

    @property
    def instance(self) -> str:
        return self.registers[-1].instance

    async def send(self, message: wire.Message | bytes) -> None:
        assert self._connection is not None
        await self._connection.send(message if isinstance(message, bytes) else wire.encode(message))

    async def want(
        self,
        *launches: wire.Launch,
        stops: tuple[wire.Stop, ...] = (),
        forget: tuple[tuple[str, int], ...] = (),
    ) -> None:
        await self.send(
            wire.Desired(
                term=self.term, instance=self.instance, launches=launches, stops=stops, forget=forget
            )
        )

    async def ask(self, kind: str, **params: Any) -> wire.Answer:
        self._questions += 1
        number = self._questions
        await self.send(wire.Query(id=number, kind=kind, term=self.term, params=params))
        await until(lambda: number in self.answers)
        return self.answers[number]

    def attempt(self, number: int = 1, job: str = JOB) -> wire.AttemptStatus | None:
        """As the newest state has it."""
        found = (
            [a for a in self.states[-1].attempts if (a.job, a.attempt) == (job, number)]
            if self.states
            else []
        )
        return found[0] if found else None

    async def phase(
        self, phase: str, number: int = 1, job: str = JOB, within_s: float = WITHIN_S
    ) -> wire.AttemptStatus:
        def reached() -> bool:
            status = self.attempt(number, job)
            return status is not None and status.phase == phase

        await until(reached, lambda: f"{self.attempt(number, job)}", within_s)
        status = self.attempt(number, job)
        assert status is not None
        return status

    async def started(self, launch: wire.Launch) -> wire.AttemptStatus:
        """Prepare, say go, and wait until the ranks run."""
        await self.want(launch)
        prepared = await self.phase("prepared", launch.attempt, launch.job)
        await self.want(going(launch, prepared))
        return await self.phase("running", launch.attempt, launch.job)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


class Agent:
    """One agent process in a folder; it can be ended and started again.

    It is on a leash that this process holds: when tests are killed, agents end what is theirs and go.
    """

    def __init__(
        self,
        folder: Path,
        endpoint: Path,
        *options: str,
        node: str = "a",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.node, self._env = folder, node, {**ENV, **(env or {})}
        self._command = [
            sys.executable, "-m", "keepstep.agent", "--dir", str(folder), "--node", node,
            "--endpoint-file", str(endpoint), "--slots", "8", "--leash", *options,
        ]  # fmt: skip
        self._log = folder.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._env, stdin=subprocess.PIPE, stdout=log, stderr=log
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def ended(self) -> int:
        assert self._process is not None
        process = self._process
        code = await asyncio.to_thread(process.wait, WITHIN_S)
        assert process.stdin is not None
        process.stdin.close()
        return code

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.ended()

    def said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def clear(self) -> None:
        """Kill it, and whatever it has left."""
        if self._process is not None:
            self._process.kill()
            await self.ended()
        for process in left_of(self.folder, self.node):
            processes.send(process, signal.SIGKILL)


def left_of(folder: Path, node: str) -> list[Process]:
    """Of an agent: its attempts' processes by their marker, standby servers and carriers by their folder."""
    launches = [path.parent for path in folder.glob("jobs/*/*/shim.json")]
    found = bearers(f"{launch.parent.name}/{launch.name}/{node}" for launch in launches)
    known = {process.pid for process in found}
    named = os.fsencode(folder) + b"/"
    for process in processes.table().values():
        with suppress(OSError):
            if process.pid not in known and named in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                found.append(process)
    return [process for process in found if process.alive]


@asynccontextmanager
async def controlled(
    folder: Path, *options: str, start: bool = True, node: str = "a", env: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Controller, Agent]]:
    """A controller and a registered agent; afterwards nothing of either is left."""
    controller = Controller(folder)
    await controller.open()
    agent = Agent(folder / f"agent-{node}", controller.endpoint, *options, node=node, env=env)
    try:
        if start:
            agent.start()
            await until(lambda: controller.registers, agent.said)
        yield controller, agent
    except BaseException:
        print(agent.said())
        raise
    finally:
        await agent.clear()
        with suppress(AttributeError):
            await controller.close()


async def until(
    look: Callable[[], object], why: Callable[[], str] = lambda: "", within_s: float = WITHIN_S
) -> None:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + within_s
    while not look():
        assert loop.time() < deadline_s, f"it did not come to pass: {why()}"
        await asyncio.sleep(0.005)


def launch_of(folder: Path, script: str, *, ranks: int = 2, attempt: int = 1, **changes: Any) -> wire.Launch:
    """A Python script that is written into `folder`, cold, on one node."""
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(script)
    run: dict[str, Any] = {
        "kind": "command", "command": ["python", "script.py"], "workdir": str(folder), "ship": "none",
        "warm": "never", "stop": {"signal": "TERM", "grace_s": 5.0}, **changes.pop("run", {}),
    }  # fmt: skip
    fields: dict[str, Any] = {
        "job": JOB, "attempt": attempt, "name": "job", "world_size": ranks, "nodes": ("a",), "node_rank": 0,
        "ranks": tuple(range(ranks)), "run": run, "layout": {"dp": ranks, "pp": 1, "cp": 1, "tp": 1},
        "replicas": ranks, **changes,
    }  # fmt: skip
    return wire.Launch(**fields)


def going(launch: wire.Launch, prepared: wire.AttemptStatus) -> wire.Launch:
    import msgspec

    return msgspec.structs.replace(launch, go=True, master=prepared.master or ("127.0.0.1", 1))


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
