"""The agent's side of carriers: one for each job that has ranks here, or may have.

A carrier is found by its socket, so a new agent finds what the one before has started. What it holds is asked
for each second, and once more before an attempt is reported dead: what the controller decides from must have
been looked at after the death. A carrier that cannot be had costs snapshots in memory, never the job.
"""

import asyncio
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepstep.agent.carrier.__main__ import LOG, STATE
from keepstep.agent.carrier.server import SOCKET
from keepstep.agent.folder import Folder
from keepstep.agent.rank import lines, processes
from keepstep.core.checkpoints import Point, folder_name
from keepstep.core.clock import Clock
from keepstep.core.errors import KeepstepError, Refused, TimedOut, Unreachable
from keepstep.core.ids import Attempt, Step
from keepstep.core.layout import Layout
from keepstep.wire.messages import Held, Keep, Launch, SnapshotStatus

_log = logging.getLogger("keepstep.agent")
_RETRY_S = 0.02
_START_S = 20.0
_ANSWER_S = 5.0
_PREPARE_S = 240.0  # states of many gigabytes come from other nodes
_REFRESH_S = 1.0
_LOOK_S = 2.0  # of which a death may be late
For = Launch | Keep  # whom a carrier is for: ranks here, or ranks elsewhere


@dataclass(slots=True)
class _Carrier:
    directory: Path
    address: str
    seen: dict[str, Any] = field(default_factory=dict)  # its last answer
    told: dict[str, Any] = field(default_factory=dict)  # where its peers are
    trouble: str = ""
    after: int = 0  # of the attempt whose end was known when it was looked at
    one: asyncio.Lock = field(default_factory=asyncio.Lock)


class Carriers:
    def __init__(
        self, folder: Folder, clock: Clock, *, bytes_max: int | None, changed: Callable[[], None],
        tell: Callable[[str, str, str], None],
    ) -> None:  # fmt: skip
        self._folder, self._clock, self._bytes_max = folder, clock, bytes_max
        self._changed, self._tell = changed, tell  # tell: kind of event, job, text
        self._known: dict[str, _Carrier] = {}
        for directory in folder.carriers.glob("*"):
            self._known[directory.name] = _Carrier(directory, "")

    def directory(self, job: str) -> Path:
        return self._folder.carriers / job

    # ---------------------------------------------------------------- for an attempt

    async def prepare(self, launch: For, address: str) -> None:
        """What this attempt's ranks will need of earlier ones is here, if there is a carrier.

        Errors: KeepstepError when a state that is to be restored by way of memory cannot be had.
        """
        if not launch.secret:
            return
        carrier = self._of(launch.job, address)
        request = {
            "do": "prepare", "attempt": launch.attempt, "world": launch.world_size,
            "ranks": list(launch.ranks), "lineage": [list(branch) for branch in launch.lineage],
            "memory": _memory(launch), "saved": _saved(launch),
        }  # fmt: skip
        try:
            await self._ensure(carrier)
            await self._meet(carrier, launch)
            await self._ask(carrier, request, within_s=_PREPARE_S)
        except KeepstepError as error:
            if launch.memory is not None or _saved(launch):
                raise
            self._trouble(launch.job, carrier, str(error))

    async def keep(self, wanted: Keep, address: str) -> None:
        """A carrier on a node that runs no rank of it: copies, or what others restore, are here."""
        try:
            await self.prepare(wanted, address)
        except KeepstepError as error:
            self._trouble(wanted.job, self._of(wanted.job, address), str(error))

    def adopt(self, launch: For, address: str) -> None:
        """Ranks of an attempt that an earlier agent has started: where another carrier would listen."""
        if launch.secret:
            self._of(launch.job, address)

    async def begin(self, launch: For, address: str) -> None:
        """Start it, while other things are prepared that take longer."""
        if launch.secret:
            carrier = self._of(launch.job, address)
            with suppress(KeepstepError):  # said by `prepare`
                await self._ensure(carrier)

    async def meet(self, launch: For) -> None:
        """Tell it where its peers are now, and who is its buddy."""
        carrier = self._known.get(launch.job)
        if carrier is None or not launch.secret:
            return
        try:
            await self._meet(carrier, launch)
        except KeepstepError as error:
            _log.warning("the carrier of %s: %s", launch.job, error)

    async def look(self, job: str, *, after: int = 0) -> None:
        """What it holds at this moment. A carrier that does not answer holds nothing.

        `after`: an attempt that is known to be dead, so that what is found will not be replaced any more.
        """
        carrier = self._known.get(job)
        if carrier is None:
            return
        before = carrier.seen
        try:
            carrier.seen = await self._ask(carrier, {"do": "held"}, within_s=_LOOK_S)
        except KeepstepError:
            carrier.seen = {}
        if carrier.seen.get("trouble"):
            self._trouble(job, carrier, str(carrier.seen["trouble"]))
        carrier.after = max(carrier.after, after)
        if after or before.get("address") != carrier.seen.get("address"):
            self._changed()

    async def follow(self, living: Callable[[], Iterable[For]]) -> None:
        """For ever: what carriers hold, and another one where one is gone while ranks need it."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            for job in list(self._known):
                await self.look(job)
            for launch in living():
                carrier = self._known.get(launch.job)
                if carrier is not None and not carrier.seen and carrier.address:
                    try:
                        await self._ensure(carrier)
                        carrier.told = {}
                        await self._meet(carrier, launch)
                        self._changed()
                    except KeepstepError as error:
                        self._trouble(launch.job, carrier, str(error))

    def statuses(self) -> tuple[SnapshotStatus, ...]:
        return tuple(
            SnapshotStatus(
                job=job,
                address=(str(carrier.seen["address"][0]), int(carrier.seen["address"][1])),
                memory_bytes=int(carrier.seen["memory_bytes"]),
                after=carrier.after,
                held=tuple(
                    Held(rank=rank, world=world, attempt=attempt, step=step, own=own)
                    for rank, world, attempt, step, own in carrier.seen["held"]
                ),
            )
            for job, carrier in sorted(self._known.items())
            if carrier.seen
        )

    async def save(self, job: str, request: dict[str, Any], *, within_s: float) -> dict[str, Any]:
        """Have what it holds of a state written. Errors: Unreachable, Refused."""
        carrier = self._known.get(job)
        if carrier is None:
            raise Unreachable(f"nothing of {job} is in this node's memory")
        return await self._ask(carrier, {"do": "save", **request}, within_s=within_s)

    # ---------------------------------------------------------------- the end

    async def release(self, wanted: Iterable[str]) -> None:
        """End the carriers of jobs that nothing here needs any more."""
        keep = frozenset(wanted)
        for job in [job for job in self._known if job not in keep]:
            carrier = self._known.pop(job)
            await self._end(carrier)
            self._changed()

    async def _end(self, carrier: _Carrier) -> None:
        with suppress(KeepstepError):
            await self._ask(carrier, {"do": "end"})
        deadline = self._clock.monotonic() + _ANSWER_S
        while (process := self._process(carrier)) is not None:
            if self._clock.monotonic() > deadline:
                processes.send(process, 9)
            await asyncio.sleep(_RETRY_S)
        await asyncio.to_thread(shutil.rmtree, carrier.directory, ignore_errors=True)

    # ---------------------------------------------------------------- within

    def _of(self, job: str, address: str) -> _Carrier:
        carrier = self._known.setdefault(job, _Carrier(self.directory(job), address))
        carrier.address = address
        return carrier

    async def _meet(self, carrier: _Carrier, launch: For) -> None:
        told = {
            "addresses": {node: list(address) for node, address in launch.carriers.items()},
            "buddy": launch.buddy, "secret": launch.secret, "bytes_max": self._bytes_max,
        }  # fmt: skip
        if told != carrier.told:
            await self._ask(carrier, {"do": "peers", **told})
            carrier.told = told

    async def _ensure(self, carrier: _Carrier) -> None:
        """Find it, or start one. Errors: TimedOut, Unreachable."""
        async with carrier.one:
            deadline = self._clock.monotonic() + _START_S
            started = False
            while True:
                try:
                    carrier.seen = await self._ask(carrier, {"do": "hello"})
                    carrier.trouble = ""
                    return
                except Unreachable:
                    pass
                if not started and self._process(carrier) is None:
                    await asyncio.to_thread(_start, carrier.directory, carrier.address)
                    carrier.told, started = {}, True
                if self._clock.monotonic() > deadline:
                    raise TimedOut("the carrier does not answer", where=str(carrier.directory))
                await asyncio.sleep(_RETRY_S)

    async def _ask(
        self, carrier: _Carrier, request: dict[str, Any], *, within_s: float = _ANSWER_S
    ) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        try:
            peer = lines.connect(carrier.directory / SOCKET)
            try:
                async with asyncio.timeout(within_s):
                    await loop.sock_sendall(peer, json.dumps(request).encode() + b"\n")
                    data = b""
                    while not data.endswith(b"\n"):
                        more = await loop.sock_recv(peer, 1 << 16)
                        if not more:
                            raise ConnectionResetError("it hung up")
                        data += more
            finally:
                peer.close()
        except OSError as error:  # TimeoutError is one
            why = str(error) or f"no answer within {within_s:g} s"
            raise Unreachable("no carrier", where=str(carrier.directory), why=why) from error
        answer: dict[str, Any] = json.loads(data)
        if "error" in answer:
            raise Refused("the carrier refuses", why=str(answer["error"]))
        if "held" in answer:
            carrier.seen = answer
        return answer

    def _process(self, carrier: _Carrier) -> processes.Process | None:
        try:
            identity = json.loads((carrier.directory / STATE).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        process = processes.read(int(identity["pid"]))
        alive = processes.is_alive(int(identity["pid"]), int(identity["start_ticks"]))
        return process if alive else None

    def _trouble(self, job: str, carrier: _Carrier, why: str) -> None:
        """Said once, until it changes."""
        if carrier.trouble != why:
            carrier.trouble = why
            _log.warning("no snapshots in memory for %s: %s", job, why)
            self._tell("snapshots_off", job, f"no snapshots in memory: {why}")


def _memory(launch: For) -> dict[str, Any] | None:
    """Which old ranks' states this node's ranks begin from, and who holds each."""
    memory = launch.memory
    if memory is None or launch.restore is None:
        return None
    old, new = Layout(**memory.layout), Layout(**launch.layout)
    wanted = set()
    for rank in launch.ranks:
        at = new.coordinates(rank)
        for dp in new.sources(old, at.dp):
            wanted.add(int(old.rank(dp=dp, pp=at.pp, cp=at.cp, tp=at.tp)))
    return {
        "world": old.world_size,
        "at": list(launch.restore),
        "wanted": [[rank, list(memory.holders[rank])] for rank in sorted(wanted)],
    }


def _saved(launch: For) -> str:
    """The folder of a script's state that was stored from memory; "": there is none to begin from."""
    if not isinstance(launch, Launch) or launch.run.get("kind") != "command":
        return ""
    if launch.restore is None or launch.memory is not None:
        return ""
    attempt, step = launch.restore
    at = Point(attempt=Attempt(attempt), step=Step(step))
    return str(Path(launch.checkpoint["dir"]) / folder_name(at))


def _start(directory: Path, address: str) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = [sys.executable, "-I", "-m", "keepstep.agent.carrier", str(directory), address]
    try:
        subprocess.run(
            command, env={"LC_CTYPE": "C.UTF-8"}, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=_START_S, check=True, cwd="/", text=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise Unreachable("the carrier could not be started", where=str(directory / LOG), why=said) from error
