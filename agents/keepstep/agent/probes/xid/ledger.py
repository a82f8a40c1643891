"""Counts of what happened, since boot: each physical event once, whoever told it and how often. Pure.

The kernel's log is counted by its sequence numbers: what was counted is not counted again by an agent that
starts anew and reads the log back. An XID is told twice, by the log and by NVML's event set; on one GPU and
code the two are paired within a minute, so that of a burst the larger count holds.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from keepstep.agent.probes.gpu.reading import pci_address
from keepstep.agent.probes.xid import catalogue
from keepstep.core.health import FaultKind
from keepstep.wire.health import FaultCount

PAIRED_S = 60.0  # a driver in trouble may hold back its events for long; its line is in the log at once
FRESH_S = 1.0  # what happens more often than that is told with the next report
COMPONENTS_MAX = 256  # counted apart; what comes after that is counted together
_TEXT_MAX = 240


class Fault(msgspec.Struct):
    kind: FaultKind
    code: int
    component: str  # XIDs: the PCI address
    count: int = 0
    first_at: float = 0.0  # monotonic
    last_at: float = 0.0
    text: str = ""
    pid: int = 0
    unpaired: dict[str, int] = {}  # told by one source alone so far, within the last seconds
    unpaired_at: float = 0.0


class Ledger(msgspec.Struct):
    """faults.msgpack: as it is kept, for one boot."""

    boot: str
    sequence: int = -1  # the last record of the kernel's log that was counted
    faults: list[Fault] = []
    actions: dict[str, tuple[int, float]] = {}  # by PCI address: what XID 154 told last, and when
    lost: int = 0  # records of the kernel's log that were overwritten before they were read


@dataclass(slots=True)
class _Burst:
    """XIDs of one code on one GPU, in one piece of the log."""

    first_at: float
    times: int = 0
    last_at: float = 0.0
    text: bytes = b""

    def __post_init__(self) -> None:
        self.last_at = self.first_at


class Book:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.fresh = False  # since it was last set so: something that had not happened for a while
        self._faults = {(f.kind, f.code, f.component): f for f in ledger.faults}

    def read(self, data: bytes, at: float | None, clock_ahead_s: float) -> bool:
        """Records of the kernel's log, oldest first. True: something was counted.

        `at`: they were written just now. None: they are from before, and `clock_ahead_s` is what has to be
        added to their own times to make them monotonic.
        """
        ledger = self.ledger
        counted, sequence = False, ledger.sequence
        xids: dict[tuple[bytes, bytes], _Burst] = {}
        for record in catalogue.RECORD.finditer(data):
            number = int(record[1])
            if number <= sequence:
                continue
            if sequence >= 0 and number > sequence + 1:
                ledger.lost += number - sequence - 1
            sequence = number
            text = record[3]
            if not any(word in text for word in catalogue.WORDS):
                continue
            when = at if at is not None else int(record[2]) / 1e6 + clock_ahead_s
            xid = catalogue.XID.search(text) if b"Xid (" in text else None
            if xid is not None:
                burst = xids.setdefault((xid[1], xid[2]), _Burst(when))
                if when > burst.last_at + PAIRED_S:  # read back: these are two
                    self._xids(xid[1], xid[2], burst)
                    burst = xids[xid[1], xid[2]] = _Burst(when)
                burst.times, burst.last_at, burst.text = burst.times + 1, when, text
                counted = True
            else:
                counted = self._other(text, when) or counted
        for (where, code), burst in xids.items():
            self._xids(where, code, burst)
        ledger.sequence = sequence
        return counted

    def _xids(self, where: bytes, number: bytes, burst: "_Burst") -> None:
        component, code, text = pci_address(where.decode()), int(number), burst.text
        if code == catalogue.ACTION_XID and (action := catalogue.ACTION.search(text)) is not None:
            self.ledger.actions[component] = int(action[1], 16), burst.last_at
        fault = self._fault(FaultKind.XID, code, component, burst.first_at)
        pid = catalogue.PID.search(text)
        self._add(fault, _unpaired(fault, "log", burst.times, burst.last_at), burst.last_at)
        _describe(fault, text, int(pid[1]) if pid is not None else 0)

    def _other(self, text: bytes, at: float) -> bool:
        for pattern in catalogue.PATTERNS:
            if (found := pattern.regex.search(text)) is not None:
                groups = found.groupdict()
                where = (groups.get("where") or b"").decode(errors="replace")
                component = pci_address(where) if pattern.kind is FaultKind.SXID else where
                fault = self._fault(pattern.kind, int(groups.get("code") or 0), component, at)
                self._add(fault, 1, at)
                _describe(fault, text, int(groups.get("pid") or 0))
                return True
        return False

    def nvml(self, pci: str, code: int, times: int, at: float) -> None:
        """XIDs that NVML's event set told."""
        fault = self._fault(FaultKind.XID, code, pci, at)
        self._add(fault, _unpaired(fault, "nvml", times, at), at)

    def _add(self, fault: Fault, times: int, at: float) -> None:
        if times:
            self.fresh = self.fresh or not fault.count or at - fault.last_at > FRESH_S
            fault.count += times
            fault.last_at = max(fault.last_at, at)

    def _fault(self, kind: FaultKind, code: int, component: str, at: float) -> Fault:
        key = kind, code, component
        fault = self._faults.get(key)
        if fault is None and len(self._faults) >= COMPONENTS_MAX:
            key = kind, 0, ""
            fault = self._faults.get(key)
        if fault is None:
            fault = Fault(kind, *key[1:], first_at=at, last_at=at)
            self._faults[key] = fault
            self.ledger.faults.append(fault)
        return fault


def told(faults: Iterable[Fault], now: float, names: Mapping[str, str]) -> Iterator[FaultCount]:
    """`names`: what components are called outside, GPUs' UUIDs by PCI address."""
    for fault in faults:
        if fault.count:
            yield FaultCount(
                kind=fault.kind, code=fault.code, count=fault.count, text=fault.text, pid=fault.pid,
                component=names.get(fault.component, fault.component),
                first_age_s=round(max(0.0, now - fault.first_at), 3),
                last_age_s=round(max(0.0, now - fault.last_at), 3),
            )  # fmt: skip


def _describe(fault: Fault, text: bytes, pid: int) -> None:
    fault.text, fault.pid = text[:_TEXT_MAX].decode(errors="replace"), pid


def _unpaired(fault: Fault, source: str, times: int, at: float) -> int:
    """How many of these the other source has not told yet."""
    if abs(at - fault.unpaired_at) > PAIRED_S:
        fault.unpaired = {}
    other = "nvml" if source == "log" else "log"
    paired = min(times, fault.unpaired.get(other, 0))
    fault.unpaired[other] = fault.unpaired.get(other, 0) - paired
    fault.unpaired[source] = fault.unpaired.get(source, 0) + times - paired
    fault.unpaired_at = max(at, fault.unpaired_at)
    return times - paired
