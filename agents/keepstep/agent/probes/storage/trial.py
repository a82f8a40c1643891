"""Run by path, as a process of its own: a bounded write, fsync and read in one folder, as a rank would.

Standard library only, begun without site-packages. It answers with one line of JSON; a folder that hangs
hangs this process and nothing else. The file never has a name that outlives it: it is made without one, or
loses it at once, so that there is nothing to clean up however this ends.
"""

import ctypes
import errno
import json
import os
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1


def trial(folder: str, size: int) -> dict[str, object]:
    began = time.monotonic()
    space = os.statvfs(folder)
    answer: dict[str, object] = {
        "free": space.f_bavail * space.f_frsize, "total": space.f_blocks * space.f_frsize,
    }  # fmt: skip
    stage = "open"
    try:
        file = _nameless(folder)
        try:
            stage = "write"
            content = memoryview(os.urandom(size))
            while content:
                content = content[os.write(file, content) :]
            stage = "fsync"
            os.fsync(file)
            stage = "read"
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(file, 0, os.SEEK_SET)
            left = size
            while left > 0:
                piece = os.read(file, left)
                if not piece:
                    raise OSError(errno.EIO, f"{left} bytes are missing")
                left -= len(piece)
        finally:
            os.close(file)
    except OSError as error:
        answer |= {"stage": stage, "error": error.strerror, "errno": error.errno}
    answer["took_s"] = time.monotonic() - began
    return answer


def _nameless(folder: str) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOTSUP}:
            raise
    name = os.path.join(folder, f".keepstep-probe-{os.getpid()}-{os.urandom(4).hex()}")  # noqa: PTH118
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(name)  # noqa: PTH108
    return file


def main(folder: str, size: str, parent: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(parent):
        return
    try:
        answer = trial(folder, int(size))
    except FileNotFoundError:
        answer = {"absent": True}
    except OSError as error:
        answer = {"stage": "statvfs", "error": error.strerror, "errno": error.errno}
    print(json.dumps(answer))  # noqa: T201 - its agent reads it


if __name__ == "__main__":
    main(*sys.argv[1:])
