"""What ranks printed, in pieces: the tail, or what came after a cursor, with a wait for more.

A cursor names a file by its inode and a place in it, so it stays true when the file is rotated. It is opaque
to whoever holds it: "inode:offset" for each rank.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from keepstep.agent.evidence import log_file

_TAIL_BLOCK = 64 << 10
LINE_BYTES_MAX = 16 << 10  # longer ones are cut: a progress bar without an end must not fill a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    lines: tuple[str, ...] = ()
    cursor: str = ""  # where the next piece begins
    more: bool = False  # it stopped at the bound of size, not at the end
    lost: bool = False  # the cursor's file was rotated away: lines are missing before this piece


def files_of(directory: Path, rank: int) -> list[Path]:
    """The rank's log files, oldest first."""
    current = log_file(directory, rank)
    older = sorted(
        (path for path in directory.glob(f"{current.name}.*") if path.suffix[1:].isdecimal()),
        key=lambda path: -int(path.suffix[1:]),
    )
    return [*older, current] if current.exists() else older


def ranks_with_logs(directory: Path) -> list[int]:
    names = (re.fullmatch(r"rank-(\d+)\.log", path.name) for path in directory.glob("rank-*.log"))
    return sorted(int(name[1]) for name in names if name)


def tail(directory: Path, rank: int, *, lines: int, bytes_max: int) -> Piece:
    """The last lines, however many files they are spread over; the cursor stands at the end."""
    found: list[str] = []
    cursor, left = "", bytes_max
    for path in reversed(files_of(directory, rank)):
        try:
            with path.open("rb") as file:
                end = file.seek(0, 2)
                inode = path.stat().st_ino
                start = max(0, end - left)
                file.seek(start)
                content = file.read(end - start)
        except FileNotFoundError:
            continue
        if not cursor:
            whole = content.rfind(b"\n") + 1  # a line that is still being written comes with the next piece
            cursor = f"{inode}:{start + whole}"
            content = content[:whole]
        here = _decode(content, cut=start > 0)
        found = here[-(lines - len(found)) :] + found if lines > len(found) else found
        left -= len(content)
        if len(found) >= lines or left <= 0:
            break
    return Piece(lines=tuple(found), cursor=cursor)


def after(directory: Path, rank: int, cursor: str, *, bytes_max: int, ended: bool) -> Piece:
    """Whole lines from a cursor on ("" : from the oldest there is). `ended`: a last line needs no newline."""
    files = files_of(directory, rank)
    by_inode = {path.stat().st_ino: k for k, path in enumerate(files) if path.exists()}
    inode, _, offset = cursor.partition(":")
    at = by_inode.get(int(inode)) if inode.isdecimal() else None
    lost = bool(cursor) and at is None
    begin = int(offset) if at is not None and offset.isdecimal() else 0
    lines: list[str] = []
    left = bytes_max
    for path in files[at or 0 :]:
        try:
            with path.open("rb") as file:
                here = path.stat().st_ino
                if file.seek(0, 2) < begin:  # another file has got the number of the old one
                    begin, lost = 0, True
                file.seek(begin)
                content = file.read(left)
                at_end = not file.read(1)
        except FileNotFoundError:
            continue
        newest = path == files[-1]
        whole = content.rfind(b"\n") + 1
        if at_end and (ended or not newest):
            whole = len(content)
        elif whole == 0 and len(content) >= LINE_BYTES_MAX:
            whole = len(content)  # a line without an end is given in pieces
        lines += _decode(content[:whole], cut=False)
        left -= whole
        cursor = f"{here}:{begin + whole}"
        if not at_end or left <= 0:
            return Piece(lines=tuple(lines), cursor=cursor, more=True, lost=lost)
        begin = 0
    return Piece(lines=tuple(lines), cursor=cursor, lost=lost)


def matching(lines: Iterable[str], pattern: re.Pattern[str] | None) -> list[str]:
    return [line for line in lines if pattern is None or pattern.search(line)]


def cursors(value: object) -> dict[int, str]:
    """Of a query's `after`, whose keys are ranks or their digits."""
    if not isinstance(value, Mapping):
        return {}
    return {int(rank): str(cursor) for rank, cursor in value.items() if str(rank).isdecimal()}


def _decode(content: bytes, *, cut: bool) -> list[str]:
    lines = content.splitlines()
    if cut:
        lines = lines[1:]
    return [line[:LINE_BYTES_MAX].decode(errors="replace") for line in lines]
