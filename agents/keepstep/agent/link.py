"""The agent's one connection to its controller.

Registration says the present state first. After it: state when something changed and every so often (the
latest wins, nothing is queued), events from the spool until acknowledged, answers. From the controller come
levels to reconcile and questions; those of an older term or for another instance of this agent are refused.
Nothing that arrives can end the agent: what is no message closes the connection, with a word in the log.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from keepstep.agent import endpoint as controllers
from keepstep.agent.endpoint import Endpoint
from keepstep.agent.folder import Folder
from keepstep.agent.settings import AgentSettings
from keepstep.agent.spool import Spool
from keepstep.core.clock import Clock
from keepstep.core.errors import KeepstepError, Unauthorized, Unreachable
from keepstep.wire import messages as wire

_log = logging.getLogger("keepstep.agent")
_OPEN_S = 10.0
_QUIET_S = 0.02  # between two reports: the first change goes out at once, those that follow it together
_RESEND_S = 10.0  # of events that were not acknowledged, over a connection that lives
_REFUSED_S = 30.0  # between two tries with credentials that were refused: they may be renewed on disk
_HERE_MAX_S = 1.0  # between tries at a controller on this machine
_UNANSWERED_MAX = 4096
_QUESTIONS_MAX = 64


@dataclass(slots=True)
class Contact:
    """What the rest of the agent needs to know of the link."""

    lease_s: float = 30.0  # until the first welcome
    term: int = 0
    connected: bool = False
    answered_at: float | None = None  # when the newest acknowledged report was sent
    endpoint: Endpoint | None = None  # the one that answered last, also after it was lost
    refused: str = ""  # why these credentials will not do; "" otherwise
    skipped: int = 0  # messages of kinds that only a newer controller knows
    stale: int = 0  # commands of an older term or for another instance
    sent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_UNANSWERED_MAX))

    def acknowledged(self, sequence: int) -> None:
        while self.sent and self.sent[0][0] <= sequence:
            self.answered_at = self.sent.popleft()[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The agent's side of the conversation."""

    instance: str
    register: Callable[[Endpoint], wire.Register]  # without state and first_event
    state: Callable[[int], wire.State]  # by sequence
    desired: Callable[[wire.Desired], None]
    answer: Callable[[wire.Query], Awaitable[wire.Answer]]


class Link:
    def __init__(
        self, settings: AgentSettings, folder: Folder, spool: Spool, node: Node, *,
        clock: Clock, chance: random.Random,
    ) -> None:  # fmt: skip
        self.contact = Contact(term=folder.read_term())
        self._settings, self._folder, self._spool, self._node = settings, folder, spool, node
        self._clock, self._chance = clock, chance
        self._sequence = 0
        self._changed, self._news = asyncio.Event(), asyncio.Event()
        self._questions: set[asyncio.Task[None]] = set()
        self._said = ""
        self._credits: float | None = None  # when the controller asked us to come back

    def changed(self) -> None:
        """There is something to report at once."""
        self._changed.set()

    def news(self) -> None:
        """There is an event in the spool."""
        self._news.set()

    async def run(self) -> None:
        """Connect, talk, come back; for ever."""
        failures, turn = 0, 0
        while True:
            began = self._clock.monotonic()
            try:
                known = controllers.endpoints(
                    self._settings, controllers.read_credential(self._folder.credential)
                )
                endpoint = known[turn % len(known)]
                await self._talk(await self._joined(endpoint))
                self._say(f"the connection to {endpoint.url} has ended")
            except Unauthorized as error:
                self.contact.refused = str(error)
                self._say(f"refused: {error}")
            except (
                KeepstepError,
                OSError,
                ConnectionClosed,
                InvalidHandshake,
                InvalidURI,
                TimeoutError,
            ) as error:
                self._say(f"no controller: {str(error) or type(error).__name__}")
            finally:
                self.contact.connected = False
            turn += 1
            failures = (
                0 if self._clock.monotonic() - began > 2 * self._settings.reconnect_max_s else failures + 1
            )
            await asyncio.sleep(self._pause_s(failures))

    def _pause_s(self, failures: int) -> float:
        if self._credits is not None:
            pause, self._credits = self._credits, None
            return pause + self._chance.uniform(0.0, 0.1 * pause)
        if self.contact.refused:
            return self._chance.uniform(0.5, 1.0) * _REFUSED_S
        few = self._settings.endpoint_file is not None  # agents of one machine: no herd to spread out
        highest = min(
            _HERE_MAX_S if few else self._settings.reconnect_max_s,
            self._settings.reconnect_first_s * 2.0 ** min(failures - 1, 20),
        )
        return self._chance.uniform(0.0, highest)

    async def _joined(self, endpoint: Endpoint) -> Endpoint:
        if not endpoint.joins:
            return endpoint
        credential = await asyncio.to_thread(controllers.join, endpoint, self._settings.node)
        controllers.store_credential(self._folder.credential, credential)
        _log.info("joined %s as %s", endpoint.url, self._settings.node)
        return Endpoint(endpoint.url, credential)

    # ---------------------------------------------------------------- one connection

    async def _talk(self, endpoint: Endpoint) -> None:
        try:
            socket = await connect(
                endpoint.socket,
                additional_headers={"Authorization": f"Bearer {endpoint.token}"},
                max_size=wire.MAX_MESSAGE_BYTES,
                open_timeout=_OPEN_S,
                close_timeout=2.0,
                compression=None,
                proxy=None if endpoint.here else True,
            )
        except InvalidStatus as error:
            status = error.response.status_code
            if status in {401, 403}:
                raise Unauthorized(
                    f"the controller refuses this agent ({status})", where=endpoint.url,
                    next="Give it a token that is valid, or join the node anew.",
                ) from error  # fmt: skip
            raise
        self.contact.refused = ""
        self.contact.endpoint = endpoint
        try:
            welcome = await self._register(socket, endpoint)
            await _first_to_end(
                self._receive(socket), self._report(socket, welcome.state_every_s), self._replay(socket)
            )
        finally:
            self.contact.connected = False
            for question in self._questions:
                question.cancel()
            await socket.close()

    async def _register(self, socket: ClientConnection, endpoint: Endpoint) -> wire.Welcome:
        state = self._next_state()
        register = msgspec.structs.replace(
            self._node.register(endpoint), state=state, first_event=self._spool.first
        )
        self.contact.sent.clear()
        await self._send_state(socket, register, state.sequence)
        async with asyncio.timeout(_OPEN_S):
            answer = self._decode(await socket.recv())
        match answer:
            case wire.Refusal():
                self._refused(answer, endpoint)
            case wire.Welcome() if answer.term < self.contact.term:
                raise Unreachable(
                    f"its term {answer.term} is older than {self.contact.term}", where=endpoint.url,
                    why="Another controller has taken over since.",
                    next=f"If its store was made anew, remove {self._folder.path / 'term.json'}.",
                )  # fmt: skip
            case wire.Welcome():
                self._see_term(answer.term)
                self.contact.lease_s = answer.lease_s
                self.contact.acknowledged(state.sequence)
                self.contact.connected = True
                self._spool.acknowledge(answer.acknowledged_event)
                self._say(f"connected to {endpoint.url} (term {answer.term}, version {answer.version})")
                return answer
        raise Unreachable("it did not welcome this agent", where=endpoint.url, why=type(answer).__name__)

    def _refused(self, refusal: wire.Refusal, endpoint: Endpoint) -> None:
        why = f"{refusal.what}: {refusal.why}" if refusal.why else refusal.what
        if refusal.retry_after_s is None:
            raise Unauthorized(why, where=endpoint.url, next=refusal.next)
        self._credits = refusal.retry_after_s
        raise Unreachable(why, where=endpoint.url, next=refusal.next)

    # ---------------------------------------------------------------- what goes out

    async def _report(self, socket: ClientConnection, every_s: float) -> None:
        reported = self._clock.monotonic()
        while True:
            try:
                async with asyncio.timeout(every_s):
                    await self._changed.wait()
                await asyncio.sleep(max(0.0, reported + _QUIET_S - self._clock.monotonic()))
            except TimeoutError:
                pass
            self._changed.clear()
            reported = self._clock.monotonic()
            state = self._next_state()
            await self._send_state(socket, state, state.sequence)

    async def _replay(self, socket: ClientConnection) -> None:
        """Events in order, one batch under way at a time."""
        while True:
            self._news.clear()
            batch = self._spool.batch()
            if batch:
                await self._send(socket, wire.Events(events=tuple(_aged(event) for event in batch)))
            try:
                async with asyncio.timeout(_RESEND_S if batch else None):
                    while not batch or self._spool.acknowledged < batch[-1].number:
                        await self._news.wait()
                        self._news.clear()
                        if not batch:
                            break
            except TimeoutError:
                _log.warning("events up to %d were not acknowledged; sent again", batch[-1].number)

    def _next_state(self) -> wire.State:
        self._sequence += 1
        return self._node.state(self._sequence)

    async def _send_state(self, socket: ClientConnection, message: wire.Message, sequence: int) -> None:
        self.contact.sent.append((sequence, self._clock.monotonic()))
        await self._send(socket, message)

    async def _send(self, socket: ClientConnection, message: wire.Message) -> None:
        data = wire.encode(message)
        if len(data) > wire.MAX_MESSAGE_BYTES:
            _log.error(
                "a message of %d bytes is too large and was not sent: %s", len(data), type(message).__name__
            )
            return
        await socket.send(data)

    # ---------------------------------------------------------------- what comes in

    async def _receive(self, socket: ClientConnection) -> None:
        async for data in socket:
            message = self._decode(data)
            match message:
                case None:
                    self.contact.skipped += 1
                case wire.Acknowledge():
                    self.contact.acknowledged(message.sequence)
                    self._spool.acknowledge(min(message.event, self._spool.last))
                    self._news.set()
                case wire.Desired():
                    if self._obeys(message.term) and message.instance == self._node.instance:
                        self._node.desired(message)
                    else:
                        self._stale(f"desired state of term {message.term} for instance {message.instance}")
                case wire.Query():
                    self._ask(socket, message)
                case wire.Refusal():
                    assert self.contact.endpoint is not None
                    self._refused(message, self.contact.endpoint)
                case wire.Welcome():
                    pass
        raise Unreachable("the controller has closed the connection", why=f"code {socket.close_code}")

    def _ask(self, socket: ClientConnection, query: wire.Query) -> None:
        if not self._obeys(query.term):
            self._stale(f"a question of term {query.term}")
            return
        if len(self._questions) >= _QUESTIONS_MAX:
            refusal = wire.Answer(id=query.id, error=f"{_QUESTIONS_MAX} questions are under way already")
            task = asyncio.create_task(self._send(socket, refusal))
        else:
            task = asyncio.create_task(self._answer(socket, query))
        self._questions.add(task)
        task.add_done_callback(self._answered)

    async def _answer(self, socket: ClientConnection, query: wire.Query) -> None:
        answer = await self._node.answer(query)
        if len(wire.encode(answer)) > wire.MAX_MESSAGE_BYTES:
            answer = wire.Answer(id=query.id, error="the answer is too large; ask for less at once")
        await self._send(socket, answer)

    def _answered(self, task: "asyncio.Task[None]") -> None:
        self._questions.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ConnectionClosed):
            _log.error("a question could not be answered", exc_info=error)

    def _decode(self, data: Any) -> wire.FromController | None:
        if not isinstance(data, bytes):
            raise Unreachable("the controller sent text where messages are bytes")
        try:
            return wire.decode_from_controller(data)
        except msgspec.MsgspecError as error:
            raise Unreachable("the controller sent what is no message", why=str(error)) from error

    def _obeys(self, term: int) -> bool:
        if term < self.contact.term:
            return False
        self._see_term(term)
        return True

    def _see_term(self, term: int) -> None:
        if term > self.contact.term:
            self._folder.write_term(term)  # before anything is done in its name
            self.contact.term = term

    def _stale(self, what: str) -> None:
        self.contact.stale += 1
        _log.warning("refused: %s; this is %s, term %d", what, self._node.instance, self.contact.term)

    def _say(self, text: str) -> None:
        """Once, until it changes."""
        if text != self._said:
            self._said = text
            _log.info("%s", text)


async def _first_to_end(*works: Coroutine[Any, Any, None]) -> None:
    """Until one of them ends or fails; then the others are ended, too."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _aged(event: wire.Event) -> wire.Event:
    """Points carry their ages; they have grown while they lay in the spool."""
    if event.kind != "points" or not event.same_boot:
        return event
    points = [[step, age + event.age_s, *figures] for step, age, *figures in event.data.get("points", ())]
    return msgspec.structs.replace(event, data={**event.data, "points": points})
