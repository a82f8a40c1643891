"""The store: what a controller must not forget, in one database that one controller at a time may write.

    store = Store.open(url, clock=SystemClock())
    store.acquire(this_process(url))
    with store.transaction() as write:            # a decision and what follows from it: all or nothing
        decision = write.add_decision(...)
        write.add_attempt(...)

Synchronous: call it from a thread. Any thread may; writes wait for each other.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from keepstep.core.clock import Clock, system_random
from keepstep.core.ids import Term
from keepstep.store import lease
from keepstep.store.engines import answering, connect, writing
from keepstep.store.migrate import prepare
from keepstep.store.reader import Reader
from keepstep.store.rows import Holder, Lease
from keepstep.store.tokens import Tokens
from keepstep.store.writer import Writer


class Store(Reader):
    def __init__(self, engine: sa.Engine, *, fresh: bool, clock: Clock, chance: random.Random) -> None:
        super().__init__(self._reading)
        self._engine = engine
        self._writing_engine = writing(engine)
        self._clock = clock
        self._chance = chance
        self._lock = threading.Lock()
        self._writer_thread: int | None = None
        self.fresh = fresh
        self.term = Term(0)
        self.name = engine.url.render_as_string(hide_password=True)
        self.tokens = Tokens(self._reading, self._transaction, clock)

    @classmethod
    def open(
        cls,
        url: str,
        *,
        clock: Clock,
        chance: random.Random | None = None,
        busy_s: float = 10.0,
        patience_s: float = 10.0,
    ) -> "Store":
        """Opens, makes or migrates a store. A path, sqlite:////path or postgresql+psycopg://...

        InputError: not a store, of a newer version, on a network file system. Refused: it needs a migration,
        and a controller is at work on it. Unreachable: no database answers there.
        """
        engine = connect(url, busy_s=busy_s)
        try:
            fresh = prepare(engine, clock=clock, patience_s=patience_s)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, fresh=fresh, clock=clock, chance=chance or system_random())

    def close(self) -> None:
        self._engine.dispose()

    # the lease

    def acquire(
        self, holder: Holder, *, patience_s: float = 10.0, sleep: Callable[[float], None] = time.sleep
    ) -> Term:
        """Becomes the one controller that may write; Refused while another lives. May take `patience_s`."""
        seen = lease.wait_until_free(self._reading, clock=self._clock, patience_s=patience_s, sleep=sleep)
        self.term = lease.take(self._writing, seen, holder, now=self._clock.wall())
        return self.term

    def beat(self, *, url: str | None = None) -> None:
        """Shows that the holder lives; to be called every second or two. Fenced when somebody took over."""
        with self._transaction() as (connection, held):
            lease.beat(connection, held, url, self._clock.wall())
            self.tokens.write_last_use(connection)

    def release(self) -> None:
        """Gives the lease back, so that the next controller need not wait."""
        with self._transaction() as (connection, _):
            lease.free(connection)
        self.term = Term(0)

    def lease(self) -> Lease:
        with self._reading() as connection:
            return lease.read(connection)

    # writing

    @contextmanager
    def transaction(self) -> Iterator[Writer]:
        """One write: all of it is on the disk when the block ends, nothing of it when it raises.

        Fenced when the term is no longer ours. Not to be nested.
        """
        with self._transaction() as (connection, _):
            yield Writer(connection, term=self.term, now=self._clock.wall(), chance=self._chance)

    @contextmanager
    def _transaction(self) -> Iterator[tuple[sa.Connection, Lease]]:
        with self._writing() as connection:
            yield connection, lease.check(connection, self.term)

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        me = threading.get_ident()
        assert self._writer_thread != me, "a transaction inside a transaction would wait for itself"
        with self._lock:
            self._writer_thread = me
            try:
                with answering(self._engine), self._writing_engine.begin() as connection:
                    yield connection
            finally:
                self._writer_thread = None

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with answering(self._engine), self._engine.connect() as connection:
            yield connection
