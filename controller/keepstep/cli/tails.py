"""Following the log files of a job's ranks on this machine, as `keepstep run` prints them.

The files are read directly, not asked for: output does not stop when the controller does. With one rank its
bytes go through as they are, progress bars included; with several, whole lines with the rank's prefix.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_CHUNK_BYTES = 1 << 18
_LINE_BYTES_MAX = 1 << 20  # a line that never ends is printed in pieces


class Tail:
    """One rank's log, across its rotations."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._inode = 0

    def read(self) -> bytes:
        """What was written since the last call, up to a bound."""
        if self._file is None and not self._open():
            return b""
        assert self._file is not None
        data = self._file.read(_CHUNK_BYTES)
        if not data and self._rotated() and self._open():
            data = self._file.read(_CHUNK_BYTES)
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> bool:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return False
        self.close()
        self._file, self._inode = file, self._path.stat().st_ino
        return True

    def _rotated(self) -> bool:
        try:
            return self._path.stat().st_ino != self._inode
        except FileNotFoundError:
            return False  # between the two renames of a rotation


class Tails:
    """All ranks of all attempts of one job under an agent's folder."""

    def __init__(self, folder: Path, *, ranks: int, write: Callable[[bytes], None]) -> None:
        self._folder, self._ranks, self._write = folder, ranks, write
        self._open: dict[tuple[int, int], Tail] = {}
        self._partial: dict[tuple[int, int], bytes] = {}

    def pump(self) -> bool:
        """Write what is new; whether there was anything."""
        self._discover()
        moved = False
        for key, tail in self._open.items():
            data = tail.read()
            if data:
                moved = True
                self._take(key, data)
        return moved

    def drain(self) -> None:
        """Write all that is left, unfinished lines too."""
        while self.pump():
            pass
        for key, rest in sorted(self._partial.items()):
            if rest:
                self._write(self._prefix(key) + rest + b"\n")
        self._partial.clear()
        for tail in self._open.values():
            tail.close()

    def _discover(self) -> None:
        for path in self._folder.glob("*/rank-*.log"):
            attempt, rank = path.parent.name, path.stem.removeprefix("rank-")
            if attempt.isdigit() and rank.isdigit() and (int(attempt), int(rank)) not in self._open:
                self._open[int(attempt), int(rank)] = Tail(path)

    def _take(self, key: tuple[int, int], data: bytes) -> None:
        if self._ranks == 1:
            self._write(data)
            return
        *lines, rest = (self._partial.get(key, b"") + data).split(b"\n")
        if len(rest) > _LINE_BYTES_MAX:
            lines, rest = [*lines, rest], b""
        self._partial[key] = rest
        if lines:
            prefix = self._prefix(key)
            self._write(b"".join(prefix + line + b"\n" for line in lines))

    def _prefix(self, key: tuple[int, int]) -> bytes:
        return b"" if self._ranks == 1 else f"[rank {key[1]}] ".encode()
