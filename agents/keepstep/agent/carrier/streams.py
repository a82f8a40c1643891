"""Between carriers: ranks' snapshots to the buddy, and states that a restore needs.

The oldest that is not sealed is sent, the same for all ranks, and nothing else before it is: so nothing is
overwritten while it is sent. A buddy that cannot be reached for a while is none: ranks are told so, and
go on.
"""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from keepstep.agent.carrier import frames
from keepstep.agent.carrier.book import Book, Key
from keepstep.agent.carrier.memory import Memory
from keepstep.core.clock import Clock
from keepstep.core.errors import KeepstepError, NotFound, Refused, Unreachable
from keepstep.core.snapshots import Stamp, to_send

_log = logging.getLogger("keepstep.carrier")
_OPEN_S = 5.0
_QUIET_S = 10.0  # without a byte from the other side in the middle of something
_RETRY_S = 0.2
_LOST_S = 5.0  # then it is no buddy
_SMALL_S = 30.0  # a node that has no memory for copies is asked again so often
_AGAIN_S = 0.05  # a buddy without a free slot has one as soon as a newer state is sealed
_SECRETS_KEPT = 2  # a controller's restart renews them, on one node before the other


class _TooSmall(Refused):
    """The buddy has too little memory: as good as none."""


@dataclass(kw_only=True)
class Peers:
    """As the agent was told: where the job's other carriers are."""

    addresses: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # by node
    buddy: str = ""  # "": none
    secrets: list[str] = field(default_factory=list)  # the newest first

    def know(self, secret: str) -> None:
        if secret and secret not in self.secrets[:1]:
            self.secrets = [secret, *(old for old in self.secrets if old != secret)][:_SECRETS_KEPT]


class Streams:
    def __init__(self, book: Book, peers: Peers, clock: Clock) -> None:
        self._book, self._peers, self._clock = book, peers, clock
        self._news = asyncio.Event()
        self._sent: dict[Key, Stamp] = {}  # what the present buddy is known to have of each rank
        self._lost_at: float | None = None
        self._rates: deque[float] = deque(maxlen=8)  # bytes/s to the present buddy, its answers included

    def nudge(self) -> None:
        """There is a new snapshot, or another buddy."""
        self._news.set()

    # ---------------------------------------------------------------- to the buddy

    async def carry(self) -> None:
        """For ever: keep the buddy up to date."""
        while True:
            buddy = self._peers.buddy
            address = self._peers.addresses.get(buddy)
            if not buddy:
                self._tell_alone()
            if address is None:  # it will be told
                self._lost_at = None
                await self._wait(None)
                continue
            try:
                with contextlib.closing(await self._connect(address)) as peer:
                    await self._serve(peer, buddy, address)
            except _TooSmall as error:
                _log.warning("%s keeps no copies: %s", buddy, error)
                self._tell_alone()
                await asyncio.sleep(_SMALL_S)
            except (KeepstepError, OSError, TimeoutError, ValueError, LookupError, TypeError) as error:
                self._unreachable(buddy, error)
                await self._wait(_RETRY_S)

    async def _serve(self, peer: socket.socket, buddy: str, address: tuple[str, int]) -> None:
        self._sent.clear()
        self._rates.clear()
        while self._peers.buddy == buddy and self._peers.addresses.get(buddy) == address:
            again = not await self._bring_up(peer)
            self._lost_at = None
            await self._wait(_AGAIN_S if again else None)

    async def _bring_up(self, peer: socket.socket) -> bool:
        """Send what the buddy lacks, then hear of all of it. False: it has no room just now."""
        sent: list[tuple[Key, Memory, Stamp]] = []
        begun, size = self._clock.monotonic(), 0
        own = list(self._book.own.items())
        for key, memory in own:  # all questions first: answers come in order
            if key not in self._sent:
                await self._ask_what_is_there(peer, key, memory)
        for key, memory in own:
            stamps, sealed = memory.stamps, memory.sealed
            at = to_send(stamps, sealed, self._book.attempt)
            if at is not None and at > self._sent[key]:
                number = stamps.index(at)
                async with asyncio.timeout(_patience_s(memory)):
                    await frames.send_slot(peer, memory, number, do="put", sealed=sealed)
                sent.append((key, memory, at))
                size += memory.slots[number].payload_bytes
        room = True
        for key, memory, at in sent:
            async with asyncio.timeout(_patience_s(memory)):
                answer = await frames.receive(peer)
            if answer.get("ok"):
                self._sent[key] = at
                memory.acknowledge(at)
            elif answer.get("small"):
                raise _TooSmall("the buddy has no memory for a snapshot", why=str(answer.get("error")))
            elif not answer.get("full"):
                raise Refused("the buddy refused a snapshot", why=str(answer.get("error")))
            room = room and bool(answer.get("ok"))
        if size and room:
            self._measured(size, self._clock.monotonic() - begun)
        return room

    def _measured(self, size: int, seconds: float) -> None:
        """What a snapshot of all ranks takes to send, by the best of the last rates."""
        self._rates.append(size / max(seconds, 1e-9))
        whole = sum(max(slot.payload_bytes for slot in one.slots) for one in self._book.own.values())
        for memory in self._book.own.values():
            memory.tell_send(int(whole / max(self._rates) * 1e9))

    async def _ask_what_is_there(self, peer: socket.socket, key: Key, memory: Memory) -> None:
        async with asyncio.timeout(_QUIET_S):
            await frames.send(peer, {"do": "have", "world": key[0], "rank": key[1]})
            there = {
                (Stamp(attempt, step), checksum)
                for attempt, step, checksum in (await frames.receive(peer))["slots"]
            }
        mine = [slot for slot in memory.slots if slot.at and slot.at.attempt == self._book.attempt]
        newest = max((slot.at for slot in mine if slot.at and (slot.at, slot.checksum) in there),
                     default=Stamp(0, -1))  # fmt: skip
        self._sent[key] = newest
        memory.acknowledge(newest)

    def _unreachable(self, buddy: str, error: Exception) -> None:
        now = self._clock.monotonic()
        if self._lost_at is None:
            self._lost_at = now
            _log.warning("the carrier of %s cannot be reached: %s", buddy, error or type(error).__name__)
        elif now - self._lost_at > _LOST_S:
            self._tell_alone()

    def _tell_alone(self) -> None:
        for memory in self._book.own.values():
            memory.acknowledge(None)
            memory.tell_send(0)

    async def _wait(self, within_s: float | None) -> None:
        try:
            async with asyncio.timeout(within_s):
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()

    # ---------------------------------------------------------------- from whoever holds it

    async def fetch(self, node: str, key: Key, at: Stamp) -> None:
        """A state from another carrier, into a file of this node's own. Errors: whatever the world does."""
        address = self._peers.addresses.get(node)
        if address is None:
            raise Unreachable(f"node {node} has not said where its carrier is")
        with contextlib.closing(await self._connect(address)) as peer:
            async with asyncio.timeout(_QUIET_S):
                parents = [[n, *(at or (0, 0))] for n, at in self._book.parents.items()]
                question = {
                    "do": "get", "world": key[0], "rank": key[1], "attempt": at.attempt, "step": at.step,
                    "lineage": parents,
                }  # fmt: skip
                await frames.send(peer, question)
                frame = await frames.receive(peer)
            if "error" in frame:
                raise NotFound(str(frame["error"]), where=f"node {node}")
            memory = self._book.made(self._book.own, frames.shape_of(frame))
            memory.stamp([None] * len(memory.stamps))
            async with asyncio.timeout(_patience_s(memory)):
                await frames.receive_slot(peer, frame, memory, 0)

    async def _connect(self, address: tuple[str, int]) -> socket.socket:
        loop = asyncio.get_running_loop()
        for secret in self._peers.secrets or [""]:
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            peer = socket.socket(family, socket.SOCK_STREAM)
            try:
                peer.setblocking(False)
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                async with asyncio.timeout(_OPEN_S):
                    await loop.sock_connect(peer, address)
                    if await frames.answer_challenge(peer, secret):
                        return peer
            except BaseException:
                peer.close()
                raise
            peer.close()
        raise Refused("the other carrier does not know this job's secret", where=f"{address[0]}:{address[1]}")


async def attend(peer: socket.socket, book: Book, peers: Peers, changed: Callable[[], None]) -> None:
    """Answer one other carrier until it hangs up."""
    with contextlib.closing(peer):
        peer.setblocking(False)
        try:
            async with asyncio.timeout(_OPEN_S):
                if not peers.secrets or not await frames.challenge(peer, peers.secrets):
                    return
            while True:
                await _answer(peer, await frames.receive(peer), book, changed)
        except (Unreachable, OSError):
            return  # it has gone
        except (KeepstepError, ValueError, KeyError, TypeError, TimeoutError) as error:
            _log.warning("a carrier is not listened to any more: %s", error)


async def _answer(
    peer: socket.socket, frame: dict[str, Any], book: Book, changed: Callable[[], None]
) -> None:
    key = int(frame["world"]), int(frame["rank"])
    match frame.get("do"):
        case "have":
            memory = book.copies.get(key)
            slots = memory.slots if memory else ()
            there = [[slot.at.attempt, slot.at.step, slot.checksum] for slot in slots if slot.at]
            await frames.send(peer, {"slots": there})
        case "put":
            await frames.send(peer, await _take(peer, frame, book))
            changed()
        case "get":
            parents = {int(n): Stamp(a, s) if a else None for n, a, s in frame["lineage"]}
            book.parents = {**book.parents, **parents}
            found = book.find(key, Stamp(int(frame["attempt"]), int(frame["step"])))
            if found is None:
                await frames.send(peer, {"error": f"step {frame['step']} of rank {key[1]} is not here"})
            else:
                await frames.send_slot(peer, *found)
        case other:
            await frames.send(peer, {"error": f"unknown request {other!r}"})


async def _take(peer: socket.socket, frame: dict[str, Any], book: Book) -> dict[str, Any]:
    at = Stamp(int(frame["attempt"]), int(frame["step"]))
    sealed = Stamp(*frame["sealed"]) if frame.get("sealed") else None
    memory = None
    try:
        memory = book.made(book.copies, frames.shape_of(frame))
        number = book.slot_for(memory, at, sealed)
    except Refused as error:
        await frames.skip(peer, frame)
        full = at.attempt >= book.attempt
        return {
            "ok": False,
            "error": str(error),
            "full": full and memory is not None,
            "small": memory is None,
        }
    if sealed is not None:
        memory.seal(sealed)
        if sealed.attempt == book.attempt:
            book.leave_other_layouts(memory.shape.world)
    if number is None:
        await frames.skip(peer, frame)
    else:
        async with asyncio.timeout(_patience_s(memory)):
            await frames.receive_slot(peer, frame, memory, number)
    return {"ok": True}


def _patience_s(memory: Memory) -> float:
    """For one slot, over a network that is worth having."""
    return _QUIET_S + memory.shape.payload_max / 1e7
