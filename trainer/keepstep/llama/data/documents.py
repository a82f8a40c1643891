"""Where texts come from: a table of documents that stay in their files.

Opening a source reads every byte once, to check and to digest it, and keeps only where each document lies:
file, offset, length. So eight ranks that open ten megabytes hold eight small tables and share one page cache.

Sources: "stdlib", the Python standard library's own *.py files, one document each; "text", a folder (every
file below it is a document, hidden ones aside) or a single file (documents are separated by blank lines).
What is not UTF-8 is left out and counted.
"""

import codecs
import functools
import mmap
import os
import re
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from keepstep.core.errors import InputError

_BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n){2,}")
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)
_BLOCK = 1 << 20  # bytes that are checked at a time
_SMALL = 1 << 24  # bytes of a file that is read whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """A table with a row for each document, in a fixed order. Lengths are bytes."""

    source: str
    files: tuple[Path, ...]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    hashes: NDArray[np.uint64]  # of each one's content
    skipped: int  # documents that are not UTF-8
    digest: str  # of all contents in order: equal digests mean equal tables

    def __len__(self) -> int:
        return len(self.length)

    def read(self, document: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a document. InputError if its file was cut since the source was opened."""
        path = self.files[self.file[document]]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = os.pread(descriptor, stop - start, int(self.offset[document]) + start)
        finally:
            os.close(descriptor)
        if len(content) != stop - start:
            raise InputError(
                "the file changed while the job was training on it",
                where=str(path),
                why=f"{stop - start} bytes were expected, {len(content)} are there",
                next="Restore the file; the job goes on from its last checkpoint.",
            )
        return content


def open_documents(source: str, path: Path | None = None) -> Documents:
    """The table of a source. InputError for one that is unknown, missing or empty."""
    match source:
        case "stdlib":
            return _library()
        case "text":
            return _text(path)
        case _:
            raise InputError(
                f"{source!r} is no source of data", where="data.source", next='Use "stdlib" or "text".'
            )


def _text(path: Path | None) -> Documents:
    if path is None:
        raise InputError(
            'source "text" needs a path', where="data.path", next="Name a file or a folder of text files."
        )
    if not path.exists():
        raise InputError(
            "there is no such file or folder",
            where="data.path",
            why=f"{path} does not exist on this node",
            next="Every node of the job needs the same files under the same path.",
        )
    return _table("text", below(path) if path.is_dir() else [path], path, split=path.is_file())


@functools.cache
def _library() -> Documents:
    """It does not change while its interpreter runs: ranks that are forked have it from their parent."""
    root = Path(sysconfig.get_path("stdlib"))
    return _table("stdlib", below(root, suffix=".py", without=_NOT_LIBRARY), root)


def below(root: Path, *, suffix: str = "", without: frozenset[str] = frozenset()) -> list[Path]:
    """Regular files below a folder in one order on every machine: by the bytes of their paths."""
    found, folders = [], [os.fspath(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in without:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name.endswith(suffix) and entry.is_file():
                    found.append(entry.path)
    return [Path(path) for path in sorted(found, key=os.fsencode)]


def _table(source: str, files: list[Path], where: Path, *, split: bool = False) -> Documents:
    digest, rows, hashes, skipped = xxhash.xxh3_128(), [], [], 0
    for number, path in enumerate(files):
        for start, stop, content, valid in documents_in(path, split=split):
            if not valid:
                skipped += 1
                continue
            digest.update((stop - start).to_bytes(8, "little"))
            digest.update(content)
            rows.append((number, start, stop - start))
            hashes.append(xxhash.xxh3_64_intdigest(content))
    if not rows:
        raise InputError(
            "there is no text to train on",
            where=str(where),
            why=f"{len(files)} files were looked at; {skipped} documents are not UTF-8, the others are empty",
            next="Name a file or a folder with UTF-8 text.",
        )
    columns = np.array(rows, dtype=np.int64).T
    return Documents(
        source=source,
        files=tuple(files),
        file=columns[0].astype(np.int32),
        offset=columns[1].copy(),
        length=columns[2].copy(),
        hashes=np.array(hashes, np.uint64),
        skipped=skipped,
        digest=digest.hexdigest(),
    )


def documents_in(path: Path, *, split: bool) -> Iterator[tuple[int, int, memoryview, bool]]:
    """Start, stop and content of each document of a file that is not empty, and whether it is UTF-8."""
    content: bytes | mmap.mmap
    try:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
                return
            if status.st_size <= _SMALL:  # reading is faster than faulting pages in
                content = file.read()
            else:
                content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except OSError as error:
        raise InputError(
            "cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            next="Make it readable for the user that the job runs as, or take it out of the folder.",
        ) from error
    whole = memoryview(content)
    for start, stop in _spans(content) if split else [(0, len(content))]:
        yield start, stop, whole[start:stop], _is_text(whole[start:stop])


def _spans(content: bytes | mmap.mmap) -> Iterator[tuple[int, int]]:
    start = 0
    for gap in _BLANK_LINES.finditer(content):
        if gap.start() > start:
            yield start, gap.start()
        start = gap.end()
    if start < len(content):
        yield start, len(content)


def _is_text(content: memoryview) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(content), _BLOCK):
            decoder.decode(content[start : start + _BLOCK], final=start + _BLOCK >= len(content))
    except UnicodeDecodeError:
        return False
    return True
