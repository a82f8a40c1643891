"""The carrier's own socket: what ranks and the agent ask of it, one JSON object a line.

From a rank    join {rank, world, attempt, description_max, payload_max} -> its memory file (with one: back)
               restore {ranks, world, at} -> files and slot numbers
               begun                                  -> the state that the attempt begins from
               taken                                  (no answer: it is a nudge)
From the agent hello, held, peers {...}, prepare {...}, end
               save {dir, ranks, world, at, lineage}  -> {files, about}: see saving
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepstep.agent.carrier.book import Book
from keepstep.agent.carrier.frames import shape_of
from keepstep.agent.carrier.memory import Memory
from keepstep.agent.carrier.saving import load, save
from keepstep.agent.carrier.streams import Peers, Streams, attend
from keepstep.agent.rank import lines
from keepstep.core.clock import Clock
from keepstep.core.errors import KeepstepError, NotFound, Refused
from keepstep.core.snapshots import Stamp

_log = logging.getLogger("keepstep.carrier")
SOCKET = "carrier.sock"
LONELY_S = 600.0
_TICK_S = 10.0
_LINE_MAX = 4 << 20


class Server:
    def __init__(self, directory: Path, listener: socket.socket, clock: Clock) -> None:
        """`listener`: for other carriers, bound to the address that they reach."""
        self._directory, self._tcp, self._clock = directory, listener, clock
        self._unix = lines.bind(directory / SOCKET)
        self.book, self.peers = Book(), Peers()
        self._streams = Streams(self.book, self.peers, clock)
        self._begun: dict[str, Any] | None = None  # the state that the present attempt begins from
        self._trouble = ""  # why ranks of the present attempt keep no snapshots
        self._connections = 0
        self._saving = asyncio.Lock()
        self._ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until it is told to end, or nobody has been here for long, or its folder is gone."""
        self._task(self._accept(self._unix, self._converse))
        self._task(self._accept(self._tcp, self._attend))
        self._task(self._streams.carry())
        seen = self._clock.monotonic()
        while not self._ended.is_set():
            try:
                async with asyncio.timeout(_TICK_S):
                    await self._ended.wait()
            except TimeoutError:
                pass
            now = self._clock.monotonic()
            seen = now if self._connections else seen
            if now - seen > LONELY_S or not (self._directory / SOCKET).exists():
                break
        (self._directory / SOCKET).unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()

    def _task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("a bug in the carrier", exc_info=error)

    async def _accept(self, listener: socket.socket, serve: Any) -> None:
        while True:
            peer, _ = await asyncio.get_running_loop().sock_accept(listener)
            peer.setblocking(False)
            self._task(serve(peer))

    async def _attend(self, peer: socket.socket) -> None:
        await attend(peer, self.book, self.peers, lambda: None)

    # ---------------------------------------------------------------- ranks and agents

    async def _converse(self, peer: socket.socket) -> None:
        self._connections += 1
        waiting: list[int] = []
        try:
            data = b""
            while True:
                await _readable(peer)
                more, descriptors, _, _ = socket.recv_fds(peer, 1 << 16, 8)
                waiting += descriptors
                data += more
                *whole, data = data.split(b"\n")
                for line in whole:
                    await self._line(peer, line, waiting)
                if not more or len(data) > _LINE_MAX:
                    return
        except (OSError, ValueError):
            return  # it has gone, or speaks another language
        finally:
            self._connections -= 1
            for descriptor in waiting:
                os.close(descriptor)
            peer.close()

    async def _line(self, peer: socket.socket, line: bytes, given: list[int]) -> None:
        request = json.loads(line)
        if request.get("do") == "taken":
            self._streams.nudge()
            self._leave_other_layouts()
            return
        descriptors: Sequence[int] = ()
        try:
            answer, descriptors = await self._obey(request, given)
        except (KeepstepError, OSError, KeyError, TypeError, ValueError) as error:
            answer = {"error": str(error) if isinstance(error, KeepstepError) else repr(error)}
        data = json.dumps(answer).encode() + b"\n"
        if descriptors:
            socket.send_fds(peer, [data[:1]], list(descriptors))  # one byte always fits
            data = data[1:]
        await asyncio.get_running_loop().sock_sendall(peer, data)

    async def _obey(self, request: dict[str, Any], given: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        match request.get("do"):
            case "join":
                return await self._join(request, given)
            case "restore":
                ranks, at = [int(r) for r in request["ranks"]], Stamp(*map(int, request["at"]))
                found = list(self.book.states(ranks, int(request["world"]), at))
                answer = {"slots": [number for _, number in found]}
                return answer, [memory.descriptor for memory, _ in found]
            case "begun":
                return {"begun": self._begun}, ()
            case "save":
                async with self._saving:  # who asks again has given up the first
                    return await save(self.book, request), ()
            case "prepare":
                await self._prepare(request)
            case "peers":
                self._learn(request)
            case "end":
                self._ended.set()
            case "hello" | "held":
                pass
            case other:
                raise NotFound(f"unknown request {other!r}")
        host, port = self._tcp.getsockname()[:2]
        return {
            "pid": os.getpid(), "trouble": self._trouble, "address": [host, port],
            "memory_bytes": self.book.memory_bytes, "held": self.book.listed(),
        }, ()  # fmt: skip

    async def _join(self, request: dict[str, Any], given: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        if int(request["attempt"]) < self.book.attempt:
            raise Refused(f"attempt {request['attempt']} was replaced by attempt {self.book.attempt}")
        self.book.attempt = int(request["attempt"])
        if given:
            memory = Memory.given(given.pop(0))
            self.book.adopt(memory)
        else:
            try:
                memory = self.book.made(self.book.own, shape_of(request))
            except Refused as error:
                self._trouble = str(error)
                raise
        if not self.peers.buddy:
            memory.acknowledge(None)
        self._streams.nudge()
        return {"ok": True}, [memory.descriptor]

    def _learn(self, request: dict[str, Any]) -> None:
        self.peers.addresses = {str(n): (str(h), int(p)) for n, (h, p) in request["addresses"].items()}
        self.peers.buddy = str(request["buddy"])
        self.peers.know(str(request["secret"]))
        self.book.bytes_max = request.get("bytes_max")
        self._streams.nudge()

    async def _prepare(self, request: dict[str, Any]) -> None:
        """An attempt begins: what its ranks need is here, stamped; what they must not meet again is gone."""
        book = self.book
        attempt = int(request["attempt"])
        if attempt < book.attempt:
            raise Refused(f"attempt {attempt} was replaced by attempt {book.attempt}")
        book.attempt = attempt
        self._begun, self._trouble = None, ""
        book.parents = {int(n): Stamp(a, s) if a else None for n, a, s in request["lineage"]}
        memory = request.get("memory")
        if memory is None:
            book.clear()
            if request.get("saved"):
                self._begun, self._trouble = await load(book, request)
        else:
            world, at = int(memory["world"]), Stamp(*map(int, memory["at"]))
            wanted = [(int(rank), [str(node) for node in nodes]) for rank, nodes in memory["wanted"]]
            await asyncio.gather(*(self._obtain((world, rank), at, nodes) for rank, nodes in wanted))
            if world == int(request["world"]):
                book.keep_own(request["ranks"], world)
                book.restored(world)
            self._begun = {"world": world, "at": list(at)}
        self._streams.nudge()

    async def _obtain(self, key: tuple[int, int], at: Stamp, nodes: Sequence[str]) -> None:
        """One old rank's state, from here or from whoever holds it."""
        found = self.book.find(key, at)
        if found is not None:
            if self.book.own.get(key) is not found[0]:
                self.book.promote(key)
            return
        why: list[str] = []
        for node in nodes:
            try:
                await self._streams.fetch(node, key, at)
            except (KeepstepError, OSError, TimeoutError, ValueError) as error:
                why.append(str(error) or type(error).__name__)
            else:
                return
        raise NotFound(
            f"step {at.step} of rank {key[1]} is not in memory any more", why="; ".join(why),
            next="The next attempt begins from what is left, or from storage.",
        )  # fmt: skip

    def _leave_other_layouts(self) -> None:
        for (world, _), memory in list(self.book.own.items()):
            sealed = memory.sealed
            if sealed is not None and sealed.attempt == self.book.attempt:
                self.book.leave_other_layouts(world)
                return


async def _readable(peer: socket.socket) -> None:
    """Until there is something to receive, descriptors included."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(peer, _wake, ready)
    try:
        await ready
    finally:
        with contextlib.suppress(ValueError, OSError):
            loop.remove_reader(peer)


def _wake(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
