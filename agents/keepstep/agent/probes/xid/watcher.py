"""Follows the kernel's log and takes NVML's events; keeps what was counted, so that it is counted once.

What is told was written down before: an agent that is killed is followed by one that tells no less. The file
is of this boot only, so it needs no sync: if the machine goes down, so do the counts.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import msgspec

from keepstep.agent.probes.gpu.reading import Events
from keepstep.agent.probes.xid import kmsg
from keepstep.agent.probes.xid.ledger import Book, Ledger, told
from keepstep.core.clock import Clock
from keepstep.core.health import ProbeState
from keepstep.wire.health import FaultCount, ProbeStatus

LOOK_S = 0.2
_PIECES_A_LOOK = 64  # between them others have their turn; after them it is written down what was counted
_SHARE_MAX = 0.2  # of one core, whatever the kernel has to say
_OPEN_AGAIN_S = 60.0
_LOST_TOLD_S = 600.0


class Watcher:
    def __init__(
        self, log: Path | None, store: Path, boot: str, clock: Clock, changed: Callable[[bool], None]
    ) -> None:
        self._log, self._store, self._clock, self._changed = log, store, clock, changed
        self.book = Book(_read(store, boot))
        self.reason = "not opened yet"
        self._kept = _copied(self.book.ledger)  # what is told: never more than what is written down
        self._lost, self._lost_at = self.book.ledger.lost, 0.0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if self._log is None:
                    self.reason = "the kernel's log is not read: turned off"
                    return
                log = kmsg.KernelLog(self._log)
            except OSError as error:
                self._say(f"{self._log} cannot be read: {error.strerror}")
                await asyncio.sleep(_OPEN_AGAIN_S)
                continue
            try:
                await self._follow(log)
            except OSError as error:
                self._say(f"{self._log} cannot be read any more: {error.strerror}")
                await asyncio.sleep(_OPEN_AGAIN_S)
            finally:
                log.close()

    async def _follow(self, log: kmsg.KernelLog) -> None:
        """Errors: OSError."""
        ahead_s = self._clock.monotonic() - kmsg.seconds_since_boot()
        back = True  # what was written before we came
        self._say("")
        while True:
            counted, spent_s = False, 0.0
            for _ in range(_PIECES_A_LOOK):
                began_s = time.thread_time()  # the clock's would count what others take of a busy machine
                data = log.read()
                at = None if back else self._clock.monotonic()
                counted = self.book.read(data, at, ahead_s) or counted
                spent_s += time.thread_time() - began_s
                if not data:
                    back = False
                    break
                await asyncio.sleep(0)
            if counted:
                self.keep()
            await asyncio.sleep(max(LOOK_S, spent_s / _SHARE_MAX - spent_s))

    def take(self, events: Events) -> None:
        """Of NVML's event set."""
        now = self._clock.monotonic()
        for pci, code, times in events.xids:
            self.book.nvml(pci, code, times, now)
        if events.xids:
            self.keep()

    def keep(self) -> None:
        """Write down what was counted; from then on it is told."""
        beside = self._store.with_name(f".{self._store.name}.{os.getpid()}")
        if self.book.ledger.lost > self._lost:
            self._lost, self._lost_at = self.book.ledger.lost, self._clock.monotonic()
        try:
            beside.write_bytes(msgspec.msgpack.encode(self.book.ledger))
            beside.rename(self._store)
        except OSError as error:
            self._say(f"{self._store} cannot be written, so counts may be told twice: {error.strerror}")
        self._kept = _copied(self.book.ledger)
        fresh, self.book.fresh = self.book.fresh, False
        self._changed(fresh)

    @property
    def actions(self) -> dict[str, tuple[int, float]]:
        """The recovery actions that XID 154 told, by PCI address."""
        return self._kept.actions

    def faults(self, names: Mapping[str, str], *, without: Set[str]) -> tuple[FaultCount, ...]:
        """`without`: components that are another agent's."""
        faults = [fault for fault in self._kept.faults if fault.component not in without]
        return tuple(told(faults, self._clock.monotonic(), names))

    def status(self, blind: str, *, gpus: bool) -> ProbeStatus:
        """`blind`: why NVML's events are not heard."""
        missing = [self.reason] if self.reason else []
        if gpus and blind:
            missing.append(blind)
        if self._lost and self._clock.monotonic() - self._lost_at < _LOST_TOLD_S:
            missing.append(f"{self.book.ledger.lost} records of the kernel's log were overwritten unread")
        state = ProbeState.DEGRADED if missing else ProbeState.OK
        return ProbeStatus(name="xid", state=state, reason="; ".join(missing))

    def _say(self, reason: str) -> None:
        if reason != self.reason:
            self.reason = reason
            self._changed(False)


def _read(store: Path, boot: str) -> Ledger:
    try:
        ledger = msgspec.msgpack.decode(store.read_bytes(), type=Ledger)
    except (OSError, msgspec.MsgspecError):  # the first one of this boot, or of another version
        return Ledger(boot)
    return ledger if ledger.boot == boot else Ledger(boot)


def _copied(ledger: Ledger) -> Ledger:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(ledger), type=Ledger)
