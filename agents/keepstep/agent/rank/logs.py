"""From a rank's pipe to its bounded files.

Standard output and standard error share one pipe, so their order is kept. A read never waits, and one
call takes only so much, so a rank that floods its pipe delays nobody. A full disk costs lines, never a
rank: what cannot be written is dropped and counted.
"""

import os
from contextlib import suppress
from pathlib import Path

_CHUNK = 1 << 16
_CHUNKS = 8  # of one rank in one turn


class RotatedLog:
    """A file and its predecessors `.1`, `.2`, ...; turned over at the end of a line where there is one."""

    def __init__(self, path: Path, *, limit_bytes: int, files: int) -> None:
        assert limit_bytes > 0
        assert files > 0
        self._path, self._limit, self._files = path, limit_bytes, files
        self._open()
        self.dropped_bytes = 0

    def write(self, data: bytes) -> None:
        while data:
            room = self._limit - self._size
            if len(data) <= room:
                self._put(data)
                return
            cut = data.rfind(b"\n", 0, max(room, 0)) + 1
            if cut == 0 and not self._line_ended:
                cut = max(room, 0)  # one line larger than what is left: it is split
            self._put(data[:cut])
            data = data[cut:]
            self._turn_over()

    def close(self) -> None:
        os.close(self._file)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._file).st_size
        self._line_ended = self._size > 0

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                written = os.write(self._file, view)
            except OSError:
                self.dropped_bytes += len(view)
                return
            self._size += written
            self._line_ended = view[written - 1] == ord("\n")
            view = view[written:]

    def _turn_over(self) -> None:
        try:
            for age in range(self._files - 1, 0, -1):
                older = self._path.with_name(f"{self._path.name}.{age}")
                newer = self._path.with_name(f"{self._path.name}.{age - 1}") if age > 1 else self._path
                with suppress(FileNotFoundError):
                    newer.replace(older)
            if self._files == 1:
                self._path.unlink(missing_ok=True)
            old = self._file
            self._open()
            os.close(old)
        except OSError:  # no room for a new file: start the present one again, bounded is what it must stay
            with suppress(OSError):
                os.ftruncate(self._file, 0)
            self._size, self._line_ended = 0, False


class Output:
    """The reading end of one rank's pipe."""

    def __init__(self, pipe: int, log: RotatedLog) -> None:
        os.set_blocking(pipe, False)
        self.pipe, self._log = pipe, log
        self.open = True

    def pump(self) -> None:
        """Take what is there, up to one turn's share."""
        for _ in range(_CHUNKS):
            try:
                data = os.read(self.pipe, _CHUNK)
            except BlockingIOError:
                return
            if not data:
                self.open = False
                return
            self._log.write(data)

    def drain(self, limit_bytes: int = 16 << 20) -> None:
        """Everything that is still in the pipe. Bounded: whoever still writes is about to be killed."""
        for _ in range(limit_bytes // (_CHUNK * _CHUNKS)):
            try:
                data = os.read(self.pipe, _CHUNK * _CHUNKS)
            except BlockingIOError:
                return
            if not data:
                self.open = False
                return
            self._log.write(data)

    def close(self) -> None:
        os.close(self.pipe)
        self._log.close()
