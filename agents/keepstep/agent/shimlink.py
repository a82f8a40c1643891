"""The agent's hold on a shim: start one, find one again, speak to it, learn how it ended.

A shim is nobody's child. It is found by its socket in the launch directory and watched through a pidfd,
so its death is noticed at once whoever started it. How an attempt ended is in `ending`.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from keepstep.agent.ending import Ending, Swept, died, last_words, processes_of, read_result, sweep
from keepstep.agent.rank import lines, processes
from keepstep.agent.rank.protocol import (
    IDENTITY,
    LAUNCH,
    MARKER,
    SOCKET,
    LaunchFile,
    RankLaunch,
    RankState,
    Rotate,
    ShimStatus,
    Stop,
)  # fmt: skip
from keepstep.agent.standby import StandbyServer
from keepstep.core.beacon import BeaconReader
from keepstep.core.errors import KeepstepError, Refused, TimedOut, Unreachable

__all__ = [
    "Ending", "LaunchFile", "RankLaunch", "RankState", "Rotate", "Shim", "ShimStatus", "Stop", "Swept",
    "adopt", "claim", "launch", "read_result", "sweep",
]  # fmt: skip

RANK_SIDE = Path(__file__).with_name("rank") / "__main__.py"

_RETRY_S, _RETRY_FIRST_S = 0.02, 0.002  # between two looks at what no descriptor tells us about
_ANSWER_S = 30.0  # a shim answers in milliseconds; on a loaded machine in seconds
_DESCRIPTORS = 253  # the kernel's limit for one message


def claim(directory: Path) -> bool:
    """Take an attempt for this node, at most once ever: False when its directory was there."""
    directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return False
    parent = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    return True


async def launch(
    directory: Path, file: LaunchFile, *, standby: StandbyServer | None = None, timeout_s: float = 30.0
) -> "Shim":
    """Start a shim in a claimed directory. A standby server that fails costs time, not the launch."""
    _write_private(directory / LAUNCH, msgspec.json.encode(file))
    async with _deadline(timeout_s, f"the shim of {file.marker} does not answer", directory):
        pid = None
        if standby is not None and file.warm:
            with suppress(Unreachable, TimedOut):
                pid = await standby.fork(directory, file.marker)
        if pid is None:
            pid = await asyncio.to_thread(_start_cold, directory, file.marker)
        return await _found(directory, file.marker, pid)


async def adopt(directory: Path, marker: str, *, timeout_s: float = 10.0) -> "Shim | Ending":
    """After a restart of the agent: the living shim of a launch directory, or how it ended."""
    async with _deadline(timeout_s, f"the shim of {marker} does not answer", directory):
        while True:
            if ending := read_result(directory):
                return ending
            if shim := await _try_connect(directory):
                return shim
            if not _shim_alive(directory, marker):
                return read_result(directory) or await died(directory, marker, ())
            await asyncio.sleep(_RETRY_S)


class Shim:
    """A link to one living shim. Closing it leaves shim and ranks as they are."""

    def __init__(self, directory: Path, connection: socket.socket) -> None:
        self.directory = directory
        self.pid = 0
        self.marker = ""
        self.status = ShimStatus(phase="preparing")
        self.beacons: dict[int, BeaconReader] = {}
        self._peer = connection
        self._loop = asyncio.get_running_loop()
        self._incoming = b""
        self._descriptors: list[int] = []
        self._asked = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._changed = asyncio.Event()
        self._held: int | None = None  # pidfd
        self._gone = asyncio.Event()  # the process has ended
        self._cut = False  # the connection has
        self._ending: Ending | None = None
        self._one = asyncio.Lock()  # who writes, and who finds out how it ended
        self._loop.add_reader(connection, self._read)

    # -- what is asked of it

    async def go(self, address: str, port: int, *, store: bool | None = None) -> ShimStatus:
        """Start the ranks, with the rendezvous at this endpoint. `store`: whether one listens there."""
        return await self._ask(do="go", master=[address, port], store=store)

    async def end(self, signal: str = "KILL", *, grace_s: float = 0.0) -> ShimStatus:
        """Begin to end every process of the attempt; it is over when the phase is dead."""
        return await self._ask(do="end", signal=signal, grace_s=grace_s)

    async def signal(self, signal: str, *, ranks: Iterable[int] | None = None) -> ShimStatus:
        return await self._ask(do="signal", signal=signal, ranks=None if ranks is None else list(ranks))

    async def refresh(self) -> ShimStatus:
        """Ask for a status with living descendants counted anew."""
        return await self._ask(do="status")

    async def wait_for(self, wanted: Callable[[ShimStatus], bool], *, timeout_s: float) -> ShimStatus:
        """The first status that is wanted. Raises Unreachable if the shim ends before."""
        async with _deadline(timeout_s, f"the shim of {self.marker} is {self.status.phase}", self.directory):
            async for status in self.changes():
                if wanted(status):
                    return status
        raise self._lost()

    async def changes(self) -> AsyncIterator[ShimStatus]:
        """The present status, then each newer one; states in between may be left out.

        Ends with the attempt, or with the shim.
        """
        while True:
            status = self.status
            yield status
            if status.phase == "dead":
                return
            while status == self.status:
                if self._gone.is_set() or self._cut:
                    return
                await self._changed.wait()

    async def ended(self, *, timeout_s: float | None = None) -> Ending:
        """Wait until the attempt is dead and say how it ended; sweep if the shim was killed.

        A shim that says "dead" has ended everything and written its result: its own exit, which takes as
        long as letting go of its memory does, is nothing to wait for.
        """
        async with _deadline(timeout_s, f"the shim of {self.marker} still runs", self.directory):
            while self.status.phase != "dead" and not self._gone.is_set():
                await self._changed.wait()
            async with self._one:
                if self._ending is None:
                    self._ending = await self._find_ending()
                return self._ending

    def close(self) -> None:
        self._hang_up()
        if self._held is not None:
            self._loop.remove_reader(self._held)
            os.close(self._held)
            self._held = None
        for beacon in self.beacons.values():
            beacon.close()
        self.beacons = {}

    # -- within

    async def hello(self) -> None:
        """Said once, by `launch` and `adopt`."""
        answer = await self._request(do="hello")
        self.pid, self.marker = answer["hello"]["pid"], answer["hello"]["marker"]
        for rank, descriptor in zip(answer["hello"]["ranks"], self._descriptors, strict=True):
            self.beacons[rank] = BeaconReader.of_descriptor(descriptor)
            os.close(descriptor)
        self._descriptors = []
        try:
            self._held = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._ended()
        else:
            self._loop.add_reader(self._held, self._ended)

    async def _ask(self, **request: Any) -> ShimStatus:
        answer = await self._request(**request)
        if not answer["ok"]:
            raise Refused(
                f"the shim refused to {request['do']}", where=self.marker, why=answer["error"],
                next="Its status says in which phase it is.",
            )  # fmt: skip
        return self.status

    async def _request(self, **request: Any) -> dict[str, Any]:
        if self._cut:
            raise self._lost()
        self._asked += 1
        number = self._asked
        answer = self._answers[number] = self._loop.create_future()
        line = json.dumps({**request, "n": number}).encode() + b"\n"
        try:
            async with _deadline(_ANSWER_S, f"the shim does not answer {request['do']}", self.directory):
                await self._loop.sock_sendall(self._peer, line)
                result: dict[str, Any] = await answer
                return result
        except OSError as error:
            raise self._lost() from error
        finally:
            self._answers.pop(number, None)

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._peer, 1 << 16, _DESCRIPTORS)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        self._descriptors += descriptors
        *whole, self._incoming = (self._incoming + data).split(b"\n")
        for line in whole:
            self._take(json.loads(line))
        if not data:
            self._hang_up()

    def _take(self, message: dict[str, Any]) -> None:
        if "status" in message:
            self.status = msgspec.convert(message["status"], ShimStatus)
            self._wake()
        answer = self._answers.get(message.get("n") or 0)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _ended(self) -> None:
        if self._held is not None:
            self._loop.remove_reader(self._held)
        self._gone.set()
        self._wake()

    def _hang_up(self) -> None:
        if not self._cut:
            self._cut = True
            self._loop.remove_reader(self._peer)
            self._peer.close()
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(self._lost())
            self._wake()

    def _lost(self) -> Unreachable:
        return Unreachable(
            "the shim is gone", where=self.marker or str(self.directory), why=last_words(self.directory),
            next="Ask how it ended.",
        )  # fmt: skip

    async def _find_ending(self) -> Ending:
        while self.status.phase != "dead" and not self._cut:  # what it sent before it ended is in the socket
            await asyncio.sleep(0)
            self._read()
        if ending := read_result(self.directory):
            return ending
        if self.status.phase == "dead":
            return Ending(ranks=self.status.ranks, reason="its result could not be written")
        return await died(self.directory, self.marker, self.status.ranks)


def _start_cold(directory: Path, marker: str) -> int:
    """Run the shim by our own interpreter, kept apart from the job's environment; its pid."""
    command = [sys.executable, "-I", "-S", str(RANK_SIDE), "shim", str(directory)]
    try:
        done = subprocess.run(
            command, env={MARKER: marker, "LC_CTYPE": "C.UTF-8"}, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=_ANSWER_S, check=True, cwd="/", text=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise Unreachable("the shim could not be started", where=marker, why=str(error)) from error
    return int(done.stdout)


async def _found(directory: Path, marker: str, pid: int) -> Shim:
    """Connect to a shim that was just started."""
    process = processes.read(pid)
    pause_s = _RETRY_FIRST_S  # a forked one listens after some milliseconds
    while True:
        if shim := await _try_connect(directory):
            return shim
        gone = process is None or not processes.is_alive(pid, process.start_ticks)
        if gone and not _shim_alive(directory, marker):
            raise Unreachable(
                "the shim ended before it could be reached", where=marker, why=last_words(directory)
            )
        await asyncio.sleep(pause_s)
        pause_s = min(_RETRY_S, 1.5 * pause_s)


async def _try_connect(directory: Path) -> Shim | None:
    try:
        shim = Shim(directory, lines.connect(directory / SOCKET))
    except OSError:  # not there yet, or nobody listens any more
        return None
    try:
        await shim.hello()
    except Unreachable:
        shim.close()
        return None
    except BaseException:
        shim.close()
        raise
    return shim


def _shim_alive(directory: Path, marker: str) -> bool:
    """Whether a shim is there, perhaps so young that it has not said who it is."""
    try:
        identity = json.loads((directory / IDENTITY).read_bytes())
    except FileNotFoundError:
        return bool(processes_of(marker))
    return processes.is_alive(identity["pid"], identity["start_ticks"])


def _write_private(path: Path, content: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "wb") as out:
        out.write(content)


class _deadline:  # noqa: N801 - reads as a statement
    """asyncio.timeout whose expiry is one of our errors."""

    def __init__(self, timeout_s: float | None, what: str, where: Path) -> None:
        self._timeout = asyncio.timeout(timeout_s)
        self._error: Callable[[], KeepstepError] = lambda: TimedOut(
            f"{what} after {timeout_s} s", where=str(where), why=last_words(where)
        )

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError:
            raise self._error() from None
