"""The client of a rank's control server: HTTP over its Unix socket, one request a connection.

The server answers from threads of PyTorch's own, also while the interpreter's lock is held, but not for a
process that is stopped: every request has a deadline and a size.
"""

import asyncio
import os
from contextlib import suppress
from pathlib import Path

from keepstep.core.errors import TimedOut, Unreachable

_ANSWER_BYTES = 16 << 20
_WORDS = "POST /handler/{} HTTP/1.1\r\nHost: rank\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


async def ask(socket: Path, handler: str, *, within_s: float) -> bytes:
    """What a handler says.

    Errors: Unreachable when there is no server or it refuses, TimedOut when it does not answer in time.
    """
    try:
        async with asyncio.timeout(within_s):
            return _body(await _exchange(socket, _WORDS.format(handler).encode()), socket, handler)
    except TimeoutError:
        what = f"the rank's control server does not answer {handler} within {within_s} s"
        raise TimedOut(what, where=str(socket)) from None
    except OSError as error:
        raise Unreachable("the rank has no control server", where=str(socket), why=str(error)) from error


async def _exchange(socket: Path, request: bytes) -> bytes:
    folder = os.open(socket.parent, os.O_PATH | os.O_DIRECTORY)
    try:  # through the folder: the name of a socket has 107 bytes at most
        reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{folder}/{socket.name}")
    finally:
        os.close(folder)
    try:
        writer.write(request)
        await writer.drain()
        answer = b""
        while len(answer) <= _ANSWER_BYTES and (piece := await reader.read(1 << 20)):
            answer += piece
        return answer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _body(answer: bytes, socket: Path, handler: str) -> bytes:
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].decode(errors="replace")
    if " 200 " not in f"{status} ":
        why = status or "it hung up"
        raise Unreachable(f"the rank's control server does not do {handler}", where=str(socket), why=why)
    if len(body) > _ANSWER_BYTES:
        raise Unreachable(f"the answer to {handler} is too large", where=str(socket))
    return body
