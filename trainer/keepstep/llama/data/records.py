"""Records of text out of files: plain text, JSON lines, Parquet, Hugging Face datasets on disk.

A *unit* is a part of one file, or some small files, that one process turns into one shard. Units are cut
without reading the text, and cover every record exactly once: a line of JSON belongs to the unit in which
its first byte lies.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepstep.core.errors import InputError
from keepstep.llama.data.documents import below, documents_in

_LINES, _PARQUET, _ARROW, _TEXT = "lines", "parquet", "arrow", "text"
_KINDS = {".jsonl": _LINES, ".ndjson": _LINES, ".json": _LINES, ".parquet": _PARQUET}
_STATE, _SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one shard is made from. Of each file: path, size in bytes, time of its last change (ns)."""

    source: str
    kind: str
    files: tuple[tuple[str, int, int], ...]
    start: int = 0  # bytes, row groups or batches, by kind
    stop: int = 0
    split: bool = False  # text: documents end at blank lines, not with their file


@dataclass(frozen=True, slots=True)
class Record:
    where: str  # file and line, row or place
    text: bytes
    bad: str = ""  # why it cannot be used


def units(source: str, path: Path, unit_bytes: int) -> Iterator[Unit]:
    """InputError for what is not there or cannot be read."""
    if not path.exists():
        raise InputError("there is no such file or folder", where=f"source {source}", why=str(path))
    if (path / _SPLITS).is_file():
        raise InputError(
            "is a dataset of several splits",
            where=str(path),
            next="Name the folder of one, as in PATH/train.",
        )
    if (path / _STATE).is_file():
        for file in _arrow_files(path):
            yield from _ranges(source, _ARROW, file, _batch_sizes(file), unit_bytes)
        return
    small: list[tuple[str, int, int]] = []
    for file in below(path) if path.is_dir() else [path]:
        kind, known = _KINDS.get(file.suffix, _TEXT), _identity(file)
        if kind == _LINES:
            for start in range(0, known[1], unit_bytes):
                stop = min(start + unit_bytes, known[1])
                yield Unit(source=source, kind=kind, files=(known,), start=start, stop=stop)
        elif kind == _PARQUET:
            yield from _ranges(source, kind, file, _group_sizes(file), unit_bytes)
        else:
            if small and sum(size for _, size, _ in small) + known[1] > unit_bytes:
                yield Unit(source=source, kind=_TEXT, files=tuple(small), split=path.is_file())
                small = []
            small.append(known)
    if small:
        yield Unit(source=source, kind=_TEXT, files=tuple(small), split=path.is_file())


def records(unit: Unit, field: str) -> Iterator[Record]:
    """All of a unit, in order. InputError for a file that is damaged as a whole, or was changed since."""
    for name, *known in unit.files:
        if known != list(_identity(Path(name))[1:]):
            raise InputError(
                "the file was changed while it was read",
                where=name,
                next="Tokenise again, into a new folder.",
            )
        match unit.kind:
            case "lines":
                yield from _lines(Path(name), unit.start, unit.stop, field)
            case "parquet":
                yield from _rows(name, _parquet_batches(Path(name), unit, field), field)
            case "arrow":
                yield from _rows(name, _arrow_batches(Path(name), unit, field), field)
            case _:
                for start, _, content, valid in documents_in(Path(name), split=unit.split):
                    yield Record(f"{name}:byte {start}", bytes(content), "" if valid else "no UTF-8")


def _identity(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError("cannot be read", where=str(path), why=error.strerror or str(error)) from error
    return str(path), status.st_size, status.st_mtime_ns


def _ranges(source: str, kind: str, file: Path, sizes: Sequence[int], unit_bytes: int) -> Iterator[Unit]:
    """Neighbouring parts of a file, together as large as a unit may be, at least one."""
    known, start, used = _identity(file), 0, 0
    for number, size in enumerate(sizes):
        if number > start and used + size > unit_bytes:
            yield Unit(source=source, kind=kind, files=(known,), start=start, stop=number)
            start, used = number, 0
        used += size
    if sizes:
        yield Unit(source=source, kind=kind, files=(known,), start=start, stop=len(sizes))


def _lines(path: Path, start: int, stop: int, field: str) -> Iterator[Record]:
    with path.open("rb") as file:
        at = start
        if start:
            file.seek(start - 1)
            at = start - 1 + len(file.readline())  # what began before is the unit's before
        while at < stop and (line := file.readline()):
            if line.strip():
                yield _of_json(f"{path}:byte {at}", line, field)
            at += len(line)


def _of_json(where: str, line: bytes, field: str) -> Record:
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        return Record(where, b"", "no UTF-8")
    except (ValueError, RecursionError):
        return Record(where, b"", "no JSON")
    if not isinstance(value, dict) or field not in value:
        return Record(where, b"", f"no field {field}")
    return _of_value(where, value[field])


def _of_value(where: str, value: object) -> Record:
    if not isinstance(value, str):
        return Record(where, b"", "no text")
    try:
        return Record(where, value.encode(), "" if value else "empty")
    except UnicodeEncodeError:
        return Record(where, b"", "no UTF-8")  # half a surrogate pair


def _rows(name: str, batches: Iterator[tuple[int, Any]], field: str) -> Iterator[Record]:
    for first, column in batches:
        for number, value in enumerate(column, start=first):
            where = f"{name}:row {number}"
            try:
                text = value.as_py()
            except UnicodeDecodeError:
                yield Record(where, b"", "no UTF-8")
                continue
            yield _of_value(where, text)


def _parquet_batches(path: Path, unit: Unit, field: str) -> Iterator[tuple[int, Any]]:
    with _arrow(path) as (pa, file):
        parquet = pa.parquet.ParquetFile(file)
        _has(parquet.schema_arrow.names, field, path)
        first = sum(parquet.metadata.row_group(k).num_rows for k in range(unit.start))
        for group in range(unit.start, unit.stop):
            column = parquet.read_row_group(group, columns=[field], use_threads=False).column(0)
            yield first, column
            first += len(column)


def _group_sizes(path: Path) -> list[int]:
    with _arrow(path) as (pa, file):
        metadata = pa.parquet.ParquetFile(file).metadata
        return [metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups)]


def _arrow_files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / _STATE).read_bytes())
        return [folder / one["filename"] for one in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("is no dataset", where=str(folder / _STATE), why=str(error)) from error


def _arrow_batches(path: Path, unit: Unit, field: str) -> Iterator[tuple[int, Any]]:
    with _arrow(path) as (pa, file):
        reader = pa.ipc.open_stream(file)
        _has(reader.schema.names, field, path)
        first = 0
        for number, batch in enumerate(reader):
            if number >= unit.stop:
                return
            if number >= unit.start:
                yield first, batch.column(field)
            first += len(batch)


def _batch_sizes(path: Path) -> list[int]:
    with _arrow(path) as (pa, file):
        return [batch.nbytes for batch in pa.ipc.open_stream(file)]


class _arrow:  # noqa: N801 - a context, used as a function
    """A file mapped by pyarrow; what goes wrong with it becomes an InputError that names it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tuple[Any, Any]:
        try:
            import pyarrow as pa
            import pyarrow.parquet
        except ImportError as error:
            raise InputError(
                "cannot be read", where=str(self._path), why="pyarrow is not installed here",
                next="Install keepstep[data].",
            ) from error  # fmt: skip
        self._error = pa.ArrowException
        try:
            self._file = pa.memory_map(os.fspath(self._path))
        except OSError as error:
            raise InputError("cannot be read", where=str(self._path), why=str(error)) from error
        return pa, self._file

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._file.close()
        if isinstance(error, self._error | OSError):
            raise InputError(
                "the file is damaged", where=str(self._path), why=str(error).partition("\n")[0],
                next="Restore it, or take it out of the source.",
            ) from error  # fmt: skip


def _has(names: Sequence[str], field: str, path: Path) -> None:
    if field not in names:
        raise InputError(
            f"has no column {field!r}",
            where=str(path),
            why=f"it has {', '.join(names)}",
            next="Name it: --field.",
        )
