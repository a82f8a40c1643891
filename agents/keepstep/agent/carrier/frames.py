"""What carriers say to each other: a length, a JSON object, and for some the bytes of a slot after it.

A connection begins with a question that only a holder of the job's secret can answer. The version is in every
frame's first bytes: what is of another one ends the connection.
"""

import asyncio
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
from typing import Any

from keepstep.agent.carrier.memory import BLOCK, Memory
from keepstep.core import snapshots
from keepstep.core.errors import InputError, Unreachable
from keepstep.core.snapshots import Slot, Stamp

_HEAD = struct.Struct("<4sI")
_MAGIC = b"KSC1"
_BYTES_MAX = 1 << 22


async def send(peer: socket.socket, frame: dict[str, Any]) -> None:
    data = json.dumps(frame).encode()
    await asyncio.get_running_loop().sock_sendall(peer, _HEAD.pack(_MAGIC, len(data)) + data)


async def receive(peer: socket.socket) -> dict[str, Any]:
    """Errors: Unreachable at the connection's end, InputError for what is no frame."""
    magic, size = _HEAD.unpack(await _exactly(peer, _HEAD.size))
    if magic != _MAGIC or size > _BYTES_MAX:
        raise InputError("a carrier said something that is no frame of this version")
    frame = json.loads(await _exactly(peer, size))
    if not isinstance(frame, dict):
        raise InputError("a carrier said something that is no object")
    return frame


async def challenge(peer: socket.socket, known: list[str]) -> bool:
    """Whether the other side holds one of the job's secrets; said to it, too."""
    nonce = secrets.token_hex(16)
    await send(peer, {"nonce": nonce})
    proof = str((await receive(peer)).get("proof"))
    right = any(hmac.compare_digest(proof, _proof(secret, nonce)) for secret in known)
    await send(peer, {"ok": right})
    return right


async def answer_challenge(peer: socket.socket, secret: str) -> bool:
    nonce = str((await receive(peer)).get("nonce"))
    await send(peer, {"proof": _proof(secret, nonce)})
    return bool((await receive(peer)).get("ok"))


async def send_slot(peer: socket.socket, memory: Memory, number: int, **more: Any) -> None:
    """A slot's frame and its bytes. The kernel copies them; nothing becomes resident here."""
    slot, shape = memory.slots[number], memory.shape
    if slot.at is None:
        raise InputError(f"slot {number} of rank {shape.rank} holds nothing any more")
    await send(
        peer,
        {
            **more, "rank": shape.rank, "world": shape.world, "attempt": slot.at.attempt,
            "step": slot.at.step, "description_bytes": slot.description_bytes,
            "payload_bytes": slot.payload_bytes,
            "description_max": shape.description_max, "payload_max": shape.payload_max,
            "algorithm": slot.algorithm, "checksum": slot.checksum,
        },
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    with os.fdopen(os.dup(memory.descriptor), "rb", buffering=0) as file:
        for start, size in (
            (shape.description_at(number), slot.description_bytes),
            (shape.payload_at(number), slot.payload_bytes),
        ):
            if size:
                await loop.sock_sendfile(peer, file, start, size)


def shape_of(frame: dict[str, Any]) -> snapshots.Shape:
    return snapshots.Shape(
        rank=int(frame["rank"]), world=int(frame["world"]), description_max=int(frame["description_max"]),
        payload_max=int(frame["payload_max"]),
    )  # fmt: skip


async def receive_slot(peer: socket.socket, frame: dict[str, Any], memory: Memory, number: int) -> Slot:
    """Write the bytes after a frame into a slot, which is whole only if they sum up to what the frame says.

    Errors: InputError if they do not; the slot holds nothing then.
    """
    slot = Slot(
        at=Stamp(int(frame["attempt"]), int(frame["step"])),
        description_bytes=int(frame["description_bytes"]),
        payload_bytes=int(frame["payload_bytes"]), algorithm=str(frame["algorithm"]),
        checksum=str(frame["checksum"]),
    )  # fmt: skip
    memory.write_slot(number, Slot())
    shape = memory.shape
    if slot.description_bytes > shape.description_max or slot.payload_bytes > shape.payload_max:
        raise InputError("a carrier sent more than a slot holds")
    loop, buffer = asyncio.get_running_loop(), memoryview(bytearray(BLOCK))
    digest = snapshots.digest(slot.algorithm)
    for start, size in (
        (shape.description_at(number), slot.description_bytes),
        (shape.payload_at(number), slot.payload_bytes),
    ):
        offset = start
        while offset < start + size:
            got = await loop.sock_recv_into(peer, buffer[: min(BLOCK, start + size - offset)])
            if not got:
                raise Unreachable("the other carrier has hung up in the middle of a slot")
            digest.update(buffer[:got])
            os.pwrite(memory.descriptor, buffer[:got], offset)
            offset += got
    if digest.hexdigest() != slot.checksum:
        raise InputError(f"step {slot.at.step if slot.at else 0} of rank {shape.rank} came damaged")
    memory.write_slot(number, slot)
    return slot


async def skip(peer: socket.socket, frame: dict[str, Any]) -> None:
    """Past the bytes of a slot that is not wanted."""
    left, buffer = int(frame["description_bytes"]) + int(frame["payload_bytes"]), bytearray(BLOCK)
    loop = asyncio.get_running_loop()
    while left:
        got = await loop.sock_recv_into(peer, memoryview(buffer)[: min(BLOCK, left)])
        if not got:
            raise Unreachable("the other carrier has hung up in the middle of a slot")
        left -= got


async def _exactly(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await asyncio.get_running_loop().sock_recv(peer, size - len(data))
        if not more:
            raise Unreachable("the other carrier has hung up")
        data += more
    return data


def _proof(secret: str, nonce: str) -> str:
    return hmac.new(secret.encode(), nonce.encode(), hashlib.sha256).hexdigest()
