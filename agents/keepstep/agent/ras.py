"""NCCL's RAS as a second witness: which ranks a communicator misses, which are behind, which have failed.

Asked only when a controller wishes it, once in ten seconds at most, and never of an NCCL before 2.29.2, where
a question alone could end the job. Counts are of launched collectives; sends, receives and graph-captured
work are not in them, so equal counts prove nothing. Written from NCCL's sources, not tried on GPUs.
"""

import asyncio
import json
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from keepstep.core.clock import Clock
from keepstep.core.errors import KeepstepError, Unreachable

SINCE = (2, 29, 2)
FILE = "nccl-ras"  # in an attempt's folder: the port that its processes listen on
_EVERY_S = 10.0
_CONNECT_S = 1.0
_ANSWER_BYTES = 16 << 20
_RANKS_MAX = 256
_LIBRARY = re.compile(r"(/\S*)/nvidia/nccl/lib/libnccl\.so")
_DISTRIBUTION = re.compile(r"nvidia_nccl_cu\d+-(\d+(?:\.\d+)*)\.dist-info")


def reserve(directory: Path) -> int:
    """A port for an attempt's processes on this node, noted in its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    (directory / FILE).write_text(str(port))
    return port


async def ask(directory: Path, pids: Sequence[int], clock: Clock, *, within_s: float) -> dict[str, Any]:
    """What RAS says of this attempt; {"error": why} where it is not asked or does not answer."""
    try:
        port = await asyncio.to_thread(_allowed, directory, pids, clock)
        async with asyncio.timeout(within_s):
            return findings(json.loads(await status("127.0.0.1", port, within_s=within_s)))
    except TimeoutError:
        return {"error": f"NCCL RAS does not answer within {within_s} s"}
    except (KeepstepError, OSError, ValueError, TypeError, LookupError) as error:
        return {"error": str(error)}


async def status(host: str, port: int, *, within_s: float) -> bytes:
    """The STATUS report as JSON. Errors: Unreachable for what does not speak the protocol."""
    try:
        async with asyncio.timeout(_CONNECT_S):  # a stopped rank accepts, and says nothing
            reader, writer = await asyncio.open_connection(host, port, limit=_ANSWER_BYTES)
    except (OSError, TimeoutError) as error:
        raise Unreachable("nobody listens for NCCL RAS", where=f"{host}:{port}", why=repr(error)) from error
    try:
        for words, expected in (
            ("CLIENT PROTOCOL 2", "SERVER PROTOCOL"),
            (f"TIMEOUT {max(1, int(within_s))}", "OK"),
            ("SET FORMAT json", "OK"),
        ):
            writer.write(f"{words}\n".encode())
            answer = (await reader.readline()).decode(errors="replace").strip()
            if not answer.startswith(expected):
                raise Unreachable(f"NCCL RAS does not know {words}", where=f"{host}:{port}", why=answer)
        writer.write(b"STATUS\n")
        report = b""
        while len(report) <= _ANSWER_BYTES and (piece := await reader.read(1 << 20)):
            report += piece
        return report
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def findings(report: Mapping[str, Any]) -> dict[str, Any]:
    """{missing, behind, failed}: global ranks as their communicators number them, with what is known of each.

    Errors: ValueError for a sample that means nothing (all counts zero, as busy jobs show now and then).
    """
    communicators = report["communicators"]
    counts = [_counts(rank) for one in communicators for rank in one["ranks"]]
    if counts and not any(sum(count.values()) for count in counts):
        raise ValueError("a sample of NCCL RAS without any counts")
    found: dict[str, list[dict[str, Any]]] = {"missing": [], "behind": [], "failed": []}
    for one in communicators:
        name, ranks = str(one.get("hash", "")), one["ranks"]
        for rank in one.get("missing_ranks") or ():
            state = rank.get("status") or {}
            dead = "dead" if state.get("considered_dead") else "unresponsive"
            found["missing"].append(_who(name, rank) | {"state": dead})
        most = {kind: max(_counts(rank).get(kind, 0) for rank in ranks) for kind in _kinds(ranks)}
        for rank in ranks:
            behind = {kind: most[kind] - n for kind, n in _counts(rank).items() if n < most[kind]}
            if behind:
                found["behind"].append(_who(name, rank) | {"by": behind})
            state = rank.get("status") or {}
            if state.get("async_error") or state.get("abort_flag"):
                found["failed"].append(_who(name, rank) | {"async_error": state.get("async_error")})
    return {kind: rows[:_RANKS_MAX] for kind, rows in found.items()}


def version_in(maps: str, names: Iterable[str] | None = None) -> tuple[int, ...]:
    """NCCL's version by the wheel that a process has loaded it from; () where that cannot be told.

    `maps`: /proc/PID/maps. `names`: of what lies beside the wheel, looked up by default.
    """
    library = _LIBRARY.search(maps)
    if library is None:
        return ()
    beside = names if names is not None else (path.name for path in Path(library[1]).iterdir())
    found = next((match for name in beside if (match := _DISTRIBUTION.fullmatch(name))), None)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def _allowed(directory: Path, pids: Sequence[int], clock: Clock) -> int:
    """The port. Errors: Unreachable when it should not be asked now."""
    try:
        file = directory / FILE
        port, age_s = int(file.read_text()), clock.wall() - file.stat().st_mtime
    except FileNotFoundError:
        raise Unreachable("NCCL is not used here") from None
    if 0 <= age_s < _EVERY_S:  # a file that was just made counts, too: groups are still being made
        raise Unreachable("NCCL RAS was asked just now", next=f"Ask again after {_EVERY_S - age_s:.0f} s.")
    version = version_in(Path(f"/proc/{pids[0]}/maps").read_text(errors="replace")) if pids else ()
    if version < SINCE:
        known = ".".join(map(str, version)) or "of an unknown version"
        raise Unreachable(f"this NCCL is {known}, and only since 2.29.2 it is safe to ask it")
    file.touch()
    return port


def _counts(rank: Mapping[str, Any]) -> dict[str, int]:
    return {str(kind): int(count) for kind, count in (rank.get("collective_counts") or {}).items()}


def _kinds(ranks: Iterable[Mapping[str, Any]]) -> set[str]:
    return {kind for rank in ranks for kind in _counts(rank)}


def _who(communicator: str, rank: Mapping[str, Any]) -> dict[str, Any]:
    return {"communicator": communicator, **{key: rank.get(key) for key in ("rank", "host", "pid")}}
