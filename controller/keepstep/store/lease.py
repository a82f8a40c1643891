"""Who may write: one controller at a time, by a term that only grows.

The lease is one row. Its holder moves a counter; whoever wants it watches that counter by a monotonic clock
of its own, so no two machines' clocks are compared. A holder of this machine whose process is gone is
replaced at once, one that is stopped when the counter has stood still long enough. Being replaced is not
noticed by the old holder: it is refused, because every write looks for its term inside its own transaction.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import sqlalchemy as sa

from keepstep.core.clock import Clock, boot_id
from keepstep.core.errors import Fenced, Refused, Unreachable
from keepstep.core.ids import Term
from keepstep.store import tables
from keepstep.store.rows import Holder, Lease

Connect = Callable[[], AbstractContextManager[sa.Connection]]
POLL_S = 0.2

_ROW = tables.lease.c.id == 1


def this_process(url: str = "", instance: str = "") -> Holder:
    """The calling process, as it is told from every other that was or will be."""
    pid = os.getpid()
    return Holder(
        host=socket.gethostname(),
        boot_id=boot_id(),
        pid_namespace=str(Path("/proc/self/ns/pid").readlink()),
        pid=pid,
        start_ticks=_start_ticks(pid) or 0,
        instance=instance,
        url=url,
    )


def read(connection: sa.Connection, *, to_write: bool = False) -> Lease:
    query = sa.select(tables.lease).where(_ROW)
    if to_write:
        query = query.with_for_update()  # SQLite's writer has the whole database already
    row = connection.execute(query).mappings().one()
    return Lease(
        term=Term(row["term"]),
        beat=row["beat"],
        holder=Holder(**row["holder"]) if row["holder"] else None,
        acquired_at=row["acquired_at"],
        beat_at=row["beat_at"],
    )


def check(connection: sa.Connection, term: Term) -> Lease:
    """Raises Fenced unless `term` is the present one; it stays so until the transaction ends."""
    now = read(connection, to_write=True)
    if term == 0 or now.term != term:
        raise Fenced(
            "this controller no longer holds the store" if term else "this process does not hold the store",
            why=f"its term is {term}, the present one is {now.term}" + _named(now.holder),
            next="End this process: another controller has taken over." if term else "",
        )
    return now


def wait_until_free(
    reading: Connect, *, clock: Clock, patience_s: float, sleep: Callable[[float], None] = time.sleep
) -> Lease:
    """The lease as it was when its holder was found gone or silent for `patience_s`; else Refused."""
    seen = _look(reading)
    if seen.holder is None or gone(seen.holder):
        return seen
    silent_s, last = 0.0, clock.monotonic()
    while silent_s < patience_s:
        sleep(min(POLL_S, patience_s))
        now = clock.monotonic()
        silent_s += min(now - last, 2 * POLL_S)  # a look that came late is not the holder's silence
        last = now
        if _look(reading) != seen:
            raise _held(seen.holder)
    return seen


def take(writing: Connect, seen: Lease, holder: Holder, *, now: float) -> Term:
    """Takes the lease as it was seen; Refused if it has moved since."""
    try:
        with writing() as connection:
            present = read(connection, to_write=True)
            if present != seen:
                raise _held(present.holder)
            term = Term(present.term + 1)
            change = sa.update(tables.lease).where(_ROW)
            connection.execute(
                change.values(term=term, beat=present.beat + 1, holder=asdict(holder), acquired_at=now)
            )
            return term
    except Unreachable as error:
        if seen.holder is None:
            raise
        raise Refused(
            f"the store is locked by a controller that does not move{_named(seen.holder)}",
            why=error.why,
            next=f"If process {seen.holder.pid} on {seen.holder.host} is stopped, end it: "
            f"kill -KILL {seen.holder.pid}",
        ) from error


def take_from_all(connection: sa.Connection) -> None:
    """Ends the present term, inside a migration: who held it wrote another schema."""
    connection.execute(sa.update(tables.lease).where(_ROW).values(term=tables.lease.c.term + 1, holder=None))


def beat(connection: sa.Connection, held: Lease, url: str | None, now: float) -> None:
    """Moves the counter of a lease that `check` has just found to be ours."""
    values: dict[str, object] = {"beat": held.beat + 1, "beat_at": now}
    if url is not None and held.holder is not None:
        values["holder"] = asdict(held.holder) | {"url": url}
    connection.execute(sa.update(tables.lease).where(_ROW).values(values))


def free(connection: sa.Connection) -> None:
    connection.execute(sa.update(tables.lease).where(_ROW).values(holder=None))


def gone(holder: Holder) -> bool:
    """Whether a holder is known to have ended. False also for a holder that cannot be seen from here."""
    here = this_process()
    if (holder.boot_id, holder.pid_namespace) != (here.boot_id, here.pid_namespace):
        return False
    return _start_ticks(holder.pid) != holder.start_ticks


def _start_ticks(pid: int) -> int | None:
    """When a process began, in ticks since boot; None for one that has ended, reaped or not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _look(reading: Connect) -> Lease:
    with reading() as connection:
        return read(connection)


def _held(holder: Holder | None) -> Refused:
    return Refused(
        "another controller holds this store",
        why=_named(holder).lstrip(" ,:("),
        next="Use that one, or end it first: `keepstep down`.",
    )


def _named(holder: Holder | None) -> str:
    if holder is None:
        return ""
    url = f", {holder.url}" if holder.url else ""
    return f", held by process {holder.pid} on {holder.host}{url}"
