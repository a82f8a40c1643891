"""The kernel's log, read without waiting: /dev/kmsg, or a file or FIFO in its format.

/dev/kmsg gives one record a read and, opened, begins with the oldest one that the kernel still has: so what
happened before this agent was started is told, too. A reader that is overtaken is told so and goes on.
"""

import os
from pathlib import Path

_READ_BYTES = 8192  # the longest record of any kernel
_PIECE_BYTES = 64 << 10  # some 800 records; whoever else has a turn waits the milliseconds that they take


class KernelLog:
    """Errors: OSError when it cannot be opened or read."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._rest = b""
        self.overtaken = 0  # how often

    def read(self) -> bytes:
        """Whole lines, a piece of bounded length; b"": there is nothing new."""
        pieces, size = [self._rest], 0
        try:
            while size < _PIECE_BYTES:
                try:
                    piece = os.read(self._descriptor, _READ_BYTES)
                except BrokenPipeError:  # the kernel has written over what was not read yet
                    self.overtaken += 1
                    continue
                if not piece:
                    break
                pieces.append(piece)
                size += len(piece)
        except BlockingIOError:
            pass
        data = b"".join(pieces)
        end = data.rfind(b"\n") + 1
        self._rest = data[end:][-_READ_BYTES:]
        return data[:end]

    def close(self) -> None:
        os.close(self._descriptor)


def seconds_since_boot() -> float:
    """By the clock that the kernel's log has, which in a virtual machine need not be CLOCK_MONOTONIC."""
    return float(Path("/proc/uptime").read_text().split()[0])
