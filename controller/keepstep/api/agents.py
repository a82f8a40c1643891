"""The agents' socket, how a node joins, and the bundles it fetches.

One WebSocket per agent. Reading is what the network allows; writing goes through a small outbox in which a
newer `Desired` replaces an unsent older one, so that a slow agent costs bounded memory.
"""

import asyncio
import logging
from collections import deque
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Body, Depends, Request, WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

import keepstep.wire.messages as wire
from keepstep.api.auth import Control, controller_of, secret_of, token_of
from keepstep.control.fleet import Member
from keepstep.control.loop import Controller
from keepstep.core.errors import InputError, KeepstepError, Unauthorized
from keepstep.core.ids import Node
from keepstep.store import Writer
from keepstep.store.rows import NewEvent, Token

log = logging.getLogger(__name__)
router = APIRouter()

_REGISTER_WITHIN_S = 10.0
_OUTBOX_MAX = 1000
_CLOSE_REPLACED = 4001
_CLOSE_REFUSED = 4003


class AgentSession:
    """The controller's end of one agent's connection."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._outbox: deque[wire.Message] = deque()
        self._news = asyncio.Event()
        self._closing: str | None = None
        self._sequence = self._event = 0  # acknowledged so far: the newest says all

    def send(self, message: wire.Message) -> None:
        if isinstance(message, wire.Acknowledge):
            self._sequence = max(self._sequence, message.sequence)
            self._event = max(self._event, message.event)
            message = wire.Acknowledge(sequence=self._sequence, event=self._event)
        if isinstance(message, wire.Desired | wire.Acknowledge):
            self._outbox = deque(m for m in self._outbox if type(m) is not type(message))
        if len(self._outbox) >= _OUTBOX_MAX:
            self.close("it does not read what it is sent")
            return
        self._outbox.append(message)
        self._news.set()

    def close(self, why: str) -> None:
        self._closing = self._closing or why
        self._news.set()

    async def deliver(self) -> None:
        """Send what is in the outbox, until closed."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._outbox:
                await self._socket.send_bytes(wire.encode(self._outbox.popleft()))
            if self._closing is not None:
                await self._socket.close(_CLOSE_REPLACED, self._closing[:100])
                return


@router.websocket("/agents/socket")
async def socket(socket: WebSocket) -> None:
    controller: Controller = socket.app.state.controller
    await socket.accept()
    session = AgentSession(socket)
    member: Member | None = None
    delivering = asyncio.create_task(session.deliver())
    try:
        member = await _register(controller, socket, session)
        listening = asyncio.create_task(_listen(controller, socket, session, member))
        done, pending = await asyncio.wait({delivering, listening}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in done:
            task.result()
    except KeepstepError as problem:
        log.warning("agent refused: %s", problem)
        await _refuse(socket, problem)
    except (WebSocketDisconnect, RuntimeError, OSError) as gone:
        log.info(
            "agent %s: connection ended: %s", member.name if member else "?", gone or type(gone).__name__
        )
    finally:
        delivering.cancel()
        if member is not None:
            controller.fleet.close(member, session)
            controller.wake()


async def _register(controller: Controller, socket: WebSocket, session: AgentSession) -> Member:
    token = await controller.on_store(
        controller.store.tokens.verify, secret_of(socket.headers.get("authorization"))
    )
    try:
        async with asyncio.timeout(_REGISTER_WITHIN_S):
            message = _decode(await socket.receive_bytes())
    except TimeoutError:
        raise InputError(f"the agent did not register within {_REGISTER_WITHIN_S:g} s") from None
    if not isinstance(message, wire.Register):
        raise InputError("the first message of an agent must be `register`")
    _may_speak_for(token, message.node)
    if not message.node or message.slots < 0:
        raise InputError("a registration needs a node name and slots >= 0")

    def write(writer: Writer) -> None:
        writer.upsert_node(
            message.node,
            pool=message.pool,
            role=message.role,
            instance=message.instance,
            slots=message.slots,
            state="ready",
            state_reason="",
            addresses=[message.address] if message.address else [],
            labels=message.labels,
            gpus=[{"uuid": gpu} for gpu in message.gpus],
            boot_id=message.boot_id,
            versions={"keepstep": message.version, "protocol": message.protocol},
        )
        writer.add_event(
            NewEvent(
                kind="node registered",
                node=Node(message.node),
                text=f"{message.node} registered with {message.slots} slots (pool {message.pool})",
            )
        )

    await controller.write(write)
    member = controller.registered(message, session)
    session.send(
        wire.Welcome(
            protocol=wire.PROTOCOL, version=socket.app.state.service.version, term=controller.store.term
        )
    )
    return member


def _may_speak_for(token: Token, node: str) -> None:
    if token.kind == "agent" and token.node == node:
        return
    if token.allows("admin"):
        return
    raise Unauthorized(
        f"token {token.name!r} may not speak for node {node!r}",
        why=f"it is for node {token.node!r}"
        if token.kind == "agent"
        else f"it is a token of kind {token.kind}",
        next="Join with `keepstep token create --join`, then `keepstep agent --token-file F`.",
    )


async def _listen(controller: Controller, socket: WebSocket, session: AgentSession, member: Member) -> None:
    while socket.client_state is WebSocketState.CONNECTED:
        message = _decode(await socket.receive_bytes())
        match message:
            case wire.State():
                controller.heard(member, message)
                session.send(wire.Acknowledge(sequence=message.sequence))
                member.acknowledged_at = controller.time.now
            case wire.Events():
                controller.events(member, session, message)
            case wire.Answer():
                controller.fleet.answer(member, message)
            case _:
                pass  # a second registration, or something only a newer version knows


def _decode(data: bytes) -> Any:
    try:
        return wire.decode_from_agent(data)
    except msgspec.DecodeError as problem:
        raise InputError("a message on the agents' socket cannot be read", why=str(problem)) from None


async def _refuse(socket: WebSocket, problem: KeepstepError) -> None:
    retry = None if isinstance(problem, Unauthorized) else 10.0
    refusal = wire.Refusal(what=problem.what, why=problem.why, next=problem.next, retry_after_s=retry)
    try:
        await socket.send_bytes(wire.encode(refusal))
        await socket.close(_CLOSE_REFUSED, problem.what[:100])
    except (WebSocketDisconnect, RuntimeError, OSError):
        pass  # it has gone already


@router.post("/join")
async def join(
    request: Request,
    control: Control,
    node: Annotated[str, Body()],
    token: Annotated[str, Body()],
    replace: Annotated[bool, Body()] = False,
) -> dict[str, str]:
    """Turn a join token into the credential of one node."""
    issued = await control.on_store(control.store.tokens.join, token, node, replace=replace)
    return {"credential": issued.secret, "node": node}


AnyToken = Annotated[Token, Depends(token_of)]

__all__ = ["AgentSession", "controller_of", "router"]
