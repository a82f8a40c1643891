"""Connections: the only module that knows how SQLite and PostgreSQL differ.

SQLite: write-ahead log, every commit flushed to the disk, foreign keys on, a writer takes the lock when it
begins (a transaction that reads first and writes later could otherwise fail half-way). The file must lie on a
file system of this machine: the log's index is shared memory, and the locks of network file systems have lost
data in every version of every server.
"""

import ctypes
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError

from keepstep.core.errors import InputError, Unreachable

_WRITES, _MIGRATES = "keepstep_writes", "keepstep_migrates"
_MIGRATION_LOCK = 0x6B656570  # an advisory lock of PostgreSQL's; any number that nobody else uses

_FUSE = 0x65735546
_NETWORK = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB",
    0xFF534D42: "CIFS",
    0x01021997: "9p",
    0x0BD00BD0: "Lustre",
    0x00C36400: "CephFS",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0xAAD7AAEA: "PanFS",
    0x20030528: "OrangeFS",
    0x5346414F: "AFS",
    0x6B414653: "AFS",
    0x73757245: "Coda",
    0x564C: "NCP",
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
    0x786F4256: "a folder shared by VirtualBox",
}
_PATIENT = {"connect_timeout": 10}
_LOCAL_FUSE = {"fuseblk", "fuse.fuse-overlayfs", "fuse.bindfs"}


def connect(url: str, *, busy_s: float) -> sa.Engine:
    """An engine for a URL or a bare path of a SQLite file; its folder is made."""
    try:
        parsed = sa.make_url(url if "://" in url else f"sqlite:///{Path(url).absolute()}")
        if parsed.get_backend_name() == "sqlite":
            return _sqlite(parsed, busy_s)
        return _postgresql(parsed, busy_s)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise InputError(
            "the store's URL cannot be used",
            where=url.rsplit("@", maxsplit=1)[-1],
            why=str(error).splitlines()[0],
            next="Give a path, sqlite:////path/store.db or postgresql+psycopg://user@host/name "
            "(which needs keepstep[postgres]).",
        ) from None


def writing(engine: sa.Engine) -> sa.Engine:
    """The same connections, whose transactions begin as writers."""
    return engine.execution_options(**{_WRITES: True})


def migrating(engine: sa.Engine) -> sa.Engine:
    """Writers that may rebuild a table which others refer to; dispose of the connections afterwards."""
    return engine.execution_options(**{_WRITES: True, _MIGRATES: True})


@contextmanager
def answering(engine: sa.Engine) -> Iterator[None]:
    """Turns the failures of a database that does not answer into an error for people."""
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        raise Unreachable(
            "the store does not answer",
            where=engine.url.render_as_string(hide_password=True),
            why=str(error.orig),
            next="'locked': another process is in the middle of a write. 'full': make room on its disk.",
        ) from error
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise Unreachable("the store closed the connection", why=str(error.orig)) from error


def insert_unless_there(connection: sa.Connection, table: sa.Table) -> Any:
    """An INSERT that leaves a row alone whose key is there already."""
    return _insert(connection, table).on_conflict_do_nothing(index_elements=list(table.primary_key))


def insert_or_update(connection: sa.Connection, table: sa.Table, *columns: str) -> Any:
    """An INSERT that sets `columns` of a row whose key is there already."""
    insert = _insert(connection, table)
    return insert.on_conflict_do_update(
        index_elements=list(table.primary_key), set_={name: insert.excluded[name] for name in columns}
    )


def lock_schema(connection: sa.Connection) -> None:
    """One migration at a time. On SQLite the transaction has the lock since its beginning."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))


def back_up(engine: sa.Engine, label: str) -> Path | None:
    """A copy of the database file beside it, taken before a migration; PostgreSQL has tools of its own."""
    if engine.dialect.name != "sqlite":
        return None
    source = Path(str(engine.url.database))
    target = source.with_name(f"{source.name}.{label}")
    descriptor = os.open(target, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.close(descriptor)
    one, other = sqlite3.connect(source), sqlite3.connect(target)
    try:
        one.backup(other)
    finally:
        other.close()
        one.close()
    return target


def refuse_network(folder: Path, *, magic: int | None = None, kind: str | None = None) -> None:
    """Refuses to keep a SQLite file where locks and shared memory do not reach every user of it."""
    magic = file_system(folder) if magic is None else magic
    name = _NETWORK.get(magic)
    if magic == _FUSE:
        kind = _mounted_as(folder) if kind is None else kind
        name = None if kind in _LOCAL_FUSE else kind
    if name is not None:
        raise InputError(
            f"the store's folder is on a network file system ({name})",
            where=str(folder),
            why="locks do not hold there, and two controllers would destroy the database",
            next="Put it on a local disk (--dir, KEEPSTEP_HOME), or use PostgreSQL by its URL.",
        )


def file_system(path: Path) -> int:
    """The magic number of the file system under a path, as statfs(2) gives it."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF


def _sqlite(url: sa.URL, busy_s: float) -> sa.Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise InputError(
            "the store needs a file",
            where=url.render_as_string(),
            why="a controller's state must outlive it",
            next="sqlite:////path/store.db",
        )
    file = Path(url.database).absolute()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    refuse_network(file.parent)
    if not file.exists():
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    engine = sa.create_engine(
        url.set(database=str(file)),
        connect_args={"timeout": busy_s, "check_same_thread": False},
        pool_size=8,
        json_serializer=_dumps,
        json_deserializer=_loads,
    )

    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself: `begin` does
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")
        except sqlite3.DatabaseError as error:
            connection.close()
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise InputError("this is not a keepstep store", where=str(file), why=str(error)) from None

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        options = connection.get_execution_options()
        if options.get(_MIGRATES):
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get(_WRITES) else "BEGIN")

    return engine


def _postgresql(url: sa.URL, busy_s: float) -> sa.Engine:
    if url.get_backend_name() != "postgresql":
        raise ArgumentError(f"{url.get_backend_name()} is not supported")
    engine = sa.create_engine(
        url, pool_pre_ping=True, json_serializer=_dumps, json_deserializer=_loads, connect_args=_PATIENT
    )

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(busy_s * 1000)}")

    return engine


def _insert(connection: sa.Connection, table: sa.Table) -> Any:
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def _mounted_as(path: Path) -> str:
    """The type of the mount that a path lies on, such as fuse.sshfs."""
    best, kind = "", "fuse"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, type_, *_ = line.split(" ")
        point = point.replace(r"\040", " ")
        inside = path == Path(point) or Path(point) in path.parents
        if inside and len(point) >= len(best):
            best, kind = point, type_
    return kind


def _dumps(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _loads(text: str) -> Any:
    return msgspec.json.decode(text)
