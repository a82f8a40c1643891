"""The agent's side of a standby server: one per node and key.

A server is keyed by what its imports depended on: interpreter, flags, environment, module list. It
survives the agent and is found again by its socket. The connection is kept open: a server without one
ends after a while.
"""

import asyncio
import hashlib
import json
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keepstep.agent.rank import lines, processes
from keepstep.agent.rank.marker import PLACEHOLDER
from keepstep.agent.rank.preload import WANTED, Wanted
from keepstep.agent.rank.protocol import MARKER, write_atomically
from keepstep.agent.rank.standby import LOG, SOCKET, STATE
from keepstep.core.errors import TimedOut, Unreachable

# A question mark: may be missing. DDP, pipelining and optimizers' constructors load torch._dynamo anyway.
DEFAULT_MODULES = ("torch", "torch.distributed", "torch._dynamo?", "numpy?")
TRAINER_MODULES = (*DEFAULT_MODULES, "keepstep.llama.preload?")

_RANK_SIDE = Path(__file__).with_name("rank") / "__main__.py"
_RETRY_S = 0.02
_FORK_S = 10.0  # a fork takes milliseconds; a busy machine is waited for, a stuck server is not


@dataclass(frozen=True, kw_only=True)
class StandbyState:
    pid: int
    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # with the reason
    unfit: Mapping[str, str]  # learnt, and left out because a fork would differ
    reads: tuple[str, ...]  # variables that the imports looked at
    changed: str  # a file that is no longer what was loaded from it
    load_s: float
    pss_bytes: int


def key_of(interpreter: Sequence[str], env: Mapping[str, str], modules: Sequence[str]) -> str:
    """Two launches with the same key can be forked from the same server."""
    whole = json.dumps([list(interpreter), sorted(env.items()), list(modules)])
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


class StandbyServer:
    """A server by its folder, whether it runs or not."""

    def __init__(
        self, directory: Path, *, interpreter: Sequence[str], env: Mapping[str, str], cwd: str,
        wanted: Wanted,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.state: StandbyState | None = None  # as it was last found
        self._interpreter, self._cwd, self._wanted = tuple(interpreter), cwd, wanted
        self._env = {**env, MARKER: PLACEHOLDER}
        self._peer: socket.socket | None = None
        self._born: processes.Process | None = None  # one that this agent has started
        self._one = asyncio.Lock()

    async def ensure(self, *, timeout_s: float = 120.0) -> StandbyState:
        """Find or start the server and wait until it is loaded. Unreachable: it never will be; start cold."""
        try:
            async with asyncio.timeout(timeout_s), self._one:
                self.state = await self._ensure()
                return self.state
        except TimeoutError:
            what = f"the standby server is not loaded after {timeout_s} s"
            raise TimedOut(what, where=str(self.directory), why=self._why()) from None

    async def fork(self, launch: Path, marker: str, *, timeout_s: float = _FORK_S) -> int:
        """A shim for a launch directory; its pid. Never starts a server, nor waits for one to load."""
        identity = self._identity()
        if identity is None or identity["state"] != "ready":
            raise Unreachable("the standby server is not loaded", where=str(self.directory), why=self._why())
        try:
            async with asyncio.timeout(timeout_s), self._one:
                answer = await self._ask({"do": "fork", "dir": str(launch), "marker": marker})
        except TimeoutError:
            self.close()
            raise TimedOut("the standby server does not fork", where=str(self.directory)) from None
        if answer.get("spent"):  # it is this attempt's now; `ensure` starts another
            self.close()
            self._born = None
        if "forked" not in answer:
            what = "the standby server cannot fork"
            raise Unreachable(what, where=str(self.directory), why=answer["error"])
        return int(answer["forked"])

    async def stop(self, *, timeout_s: float = 10.0) -> None:
        """End the server, also one that is still loading; its shims and ranks go on."""
        identity = self._identity()
        with suppress(Unreachable, TimeoutError):
            if identity and identity["state"] == "ready":
                async with asyncio.timeout(timeout_s / 2), self._one:
                    await self._ask({"do": "stop"})
        self.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s / 2):
                await self._until_gone(kill=identity is not None and identity["state"] != "ready")
        await self._until_gone(kill=True)

    def close(self) -> None:
        """Let go of it: it goes on for ten minutes, or as long as a shim of it lives."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    async def _ensure(self) -> StandbyState:
        started = False
        while True:
            try:
                hello = (await self._ask({"do": "hello"}))["hello"]
                if not hello["changed"] or started:
                    lists = {name: tuple(hello[name]) for name in ("loaded", "missing", "reads")}
                    return StandbyState(**{**hello, **lists})
                await self._ask({"do": "stop"})  # a cold start would load what is there now
                self.close()
                await self._until_gone(kill=False)
            except Unreachable:
                pass
            if not self._alive():
                if started:
                    raise Unreachable(
                        "the standby server did not load", where=str(self.directory), why=self._why(),
                        next="Ranks start cold, which is slower and otherwise the same.",
                    )  # fmt: skip
                await asyncio.to_thread(self._start)
                started = True
            await asyncio.sleep(_RETRY_S)

    def _start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.directory / STATE).unlink(missing_ok=True)
        write_atomically(self.directory / WANTED, asdict(self._wanted))
        words = [str(_RANK_SIDE), "standby", str(self.directory)]
        try:
            done = subprocess.run(
                [*self._interpreter, *words], env=self._env, cwd=self._cwd, stdin=subprocess.DEVNULL,
                capture_output=True, timeout=60, check=True, text=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            what = "the standby server could not be started"
            raise Unreachable(what, where=str(self.directory), why=said) from error
        self._born = processes.read(int(done.stdout.split()[-1]))

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        try:
            if self._peer is None:
                self._peer = lines.connect(self.directory / SOCKET)
            await loop.sock_sendall(self._peer, json.dumps(request).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                data = await loop.sock_recv(self._peer, 1 << 16)
                if not data:
                    raise ConnectionResetError("it hung up")
                answer += data
        except OSError as error:
            self.close()
            raise Unreachable("no standby server", where=str(self.directory), why=str(error)) from error
        except BaseException:
            self.close()  # an answer that comes later belongs to nobody
            raise
        result: dict[str, Any] = json.loads(answer)
        return result

    def _identity(self) -> dict[str, Any] | None:
        try:
            identity: dict[str, Any] = json.loads((self.directory / STATE).read_bytes())
        except FileNotFoundError:
            return None
        return identity

    def _alive(self) -> bool:
        if self._born is not None and processes.is_alive(self._born.pid, self._born.start_ticks):
            return True
        identity = self._identity()
        return identity is not None and processes.is_alive(identity["pid"], identity["start_ticks"])

    async def _until_gone(self, *, kill: bool) -> None:
        identity = self._identity()
        while identity is not None and processes.is_alive(identity["pid"], identity["start_ticks"]):
            process = processes.read(identity["pid"])
            if kill and process is not None and process.start_ticks == identity["start_ticks"]:
                processes.send(process, 9)
            await asyncio.sleep(_RETRY_S)
        (self.directory / SOCKET).unlink(missing_ok=True)

    def _why(self) -> str:
        identity = self._identity()
        if identity is not None and identity["why"]:
            return str(identity["why"])
        with suppress(OSError):
            said = (self.directory / LOG).read_text(errors="replace").strip().splitlines()
            return said[-1] if said else ""
        return ""
