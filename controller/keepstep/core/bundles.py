"""A shipped working folder, unpacked on a node.

A bundle is a tar.gz that is named by the sha256 of its bytes. It comes from a user, so nothing in it is
trusted: only plain files, folders and links that stay inside are made, under a limit, in a new folder that
gets its name when it is complete. Files are written before any link exists, so none is written through one.

Standard library only: agents unpack.
"""

import gzip
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from keepstep.core.errors import InputError

LIMIT_BYTES = 256 * 2**20  # of the files, unpacked
MOST_FILES = 100_000
_OVERHEAD = 2048  # of tar, for each file: header, padding, a long name
_CHUNK = 1 << 20


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stays_inside(name: str, target: str) -> bool:
    """Whether a link at `name` (relative to the folder) to `target` leads to somewhere in the folder.

    `..` is allowed at the beginning of a target only, so that no other link can bend it.
    """
    if not target or target.startswith("/"):
        return False
    parts = PurePosixPath(target).parts
    ups = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    return ".." not in parts[ups:] and ups < len(PurePosixPath(name).parts)


def extract(archive: Path, target: Path, *, sha256: str, limit_bytes: int = LIMIT_BYTES) -> None:
    """Unpack into the new folder `target`, all or nothing. Done already: nothing happens.

    InputError if the archive is not the one that was named, is damaged, too large, or wants more than
    files, folders and links inside.
    """
    if target.is_dir():
        return  # the folder has its name only once it is complete
    seen = digest(archive)
    if seen != sha256:
        why = f"its sha256 is {seen[:12]}..., not {sha256[:12]}..."
        raise InputError(
            "is not the bundle that was asked for", where=str(archive), why=why, next="Fetch it anew."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=target.parent))
    try:
        with gzip.open(archive, "rb") as stream:
            bounded = io.BufferedReader(_Bounded(stream, limit_bytes + MOST_FILES * _OVERHEAD), _CHUNK)
            with tarfile.open(fileobj=bounded, mode="r|", format=tarfile.PAX_FORMAT) as tar:
                _unpack(tar, scratch, limit_bytes)
        scratch.chmod(0o755)
        _claim(scratch, target)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UnicodeError, OverflowError) as error:
        next_ = "Submit the job again."
        raise InputError("a damaged bundle", where=str(archive), why=str(error), next=next_) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _claim(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # somebody else was faster: theirs has the same bytes
            raise


def _unpack(tar: tarfile.TarFile, root: Path, limit_bytes: int) -> None:
    links: list[tuple[str, str]] = []
    total = 0
    for count, member in enumerate(tar):
        name = _safe_name(member.name)
        if count >= MOST_FILES:
            raise _refused(name, f"is one more than {MOST_FILES:,} files")
        if member.isdir():
            if name:
                _make(root / name, folder=True)
        elif member.issym():
            if not stays_inside(name, member.linkname):
                raise _refused(name, f"is a link that leaves the folder: {member.linkname}")
            links.append((name, member.linkname))
        elif member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            total += member.size
            if total > limit_bytes:
                raise _refused(name, f"makes it larger than {limit_bytes:,} bytes")
            content = tar.extractfile(member)
            assert content is not None
            _make(root / name, folder=False)
            _write(root / name, content, 0o755 if member.mode & 0o100 else 0o644)
        else:
            raise _refused(name, "is neither a file, a folder nor a link")
    for name, link in links:
        _make(root / name, folder=False)
        (root / name).symlink_to(link)


def _safe_name(name: str) -> str:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise _refused(name, "leaves the folder")
    return "/".join(parts)


def _make(path: Path, *, folder: bool) -> None:
    """The folders above `path`, and itself if it is one; a file must not be there yet."""
    try:
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True, mode=0o755)
    except (FileExistsError, NotADirectoryError):
        raise _refused(path.name, "stands beneath a file") from None
    if not folder and os.path.lexists(path):
        raise _refused(path.name, "is in it twice")


def _write(path: Path, content: IO[bytes], mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as stream:
        shutil.copyfileobj(content, stream, _CHUNK)
    path.chmod(mode)  # whatever the umask


def _refused(name: str, why: str) -> InputError:
    return InputError(f"the bundle cannot be unpacked: {name or '.'} {why}", next="Submit the job again.")


class _Bounded(io.RawIOBase):
    """Reads no more than so much of what a small archive may grow to."""

    def __init__(self, stream: gzip.GzipFile, left: int) -> None:
        self._stream, self._left = stream, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._left <= 0:
            raise tarfile.ReadError("it grows beyond every limit")
        data = self._stream.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)
