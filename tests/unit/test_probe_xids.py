"""Counting what happened: each physical event once."""

import asyncio
import itertools
import os
from pathlib import Path

import pytest

from keepstep.agent.probes.gpu.reading import Events
from keepstep.agent.probes.xid.kmsg import KernelLog
from keepstep.agent.probes.xid.ledger import COMPONENTS_MAX, Book, Ledger, told
from keepstep.agent.probes.xid.watcher import Watcher
from keepstep.core.clock import ManualClock, SystemClock
from keepstep.core.health import FaultKind, ProbeState
from keepstep.wire.health import FaultCount

PCI = "0000:0f:00.0"


def record(sequence: int, text: str, at_s: float = 1.0) -> bytes:
    return f"4,{sequence},{int(at_s * 1e6)},-;{text}\n".encode()


def xid(sequence: int, code: int = 79, address: str = "PCI:0000:0f:00", at_s: float = 1.0) -> bytes:
    return record(sequence, f"NVRM: Xid ({address}): {code}, pid=4242, name=python, it broke", at_s)


def counts(book: Book, now: float = 1000.0) -> list[FaultCount]:
    return list(told(book.ledger.faults, now, {PCI: "GPU-a"}))


@pytest.mark.parametrize(
    ("text", "kind", "code", "component", "pid"),
    [
        ("NVRM: Xid (PCI:0000:0f:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
         FaultKind.XID, 79, "GPU-a", 0),
        ("NVRM: Xid (0000:0f:00): 31, pid=812, Ch 00000010, intr 10000000. MMU Fault",
         FaultKind.XID, 31, "GPU-a", 812),
        ("NVRM: Xid (PCI:0000:8d:00): 149, NETIR_LINK_EVT  Fatal XC0 i0 Link 00 (0x004505c6 0x00000000)",
         FaultKind.XID, 149, "0000:8d:00.0", 0),
        ("nvidia-nvswitch3: SXid (PCI:0000:a9:00.0): 20034, Fatal, Link 30 LTSSM Fault Up",
         FaultKind.SXID, 20034, "0000:a9:00.0", 0),
        ("Out of memory: Killed process 1234 (python) total-vm:1kB", FaultKind.OOM_KILL, 0, "", 1234),
        ("Memory cgroup out of memory: Killed process 99 (pt_main_thread)", FaultKind.OOM_KILL, 0, "", 99),
        ("INFO: task pt_main_thread:31337 blocked for more than 122 seconds.",
         FaultKind.BLOCKED_TASK, 0, "", 31337),
        ("nfs: server filer-7 not responding, still trying", FaultKind.NETWORK_FS, 0, "filer-7", 0),
        ("EXT4-fs error (device sda1): ext4_find_entry:1463: inode #2: comm ls", FaultKind.FILE_SYSTEM, 0,
         "sda1", 0),
        ("EXT4-fs (sda1): Remounting filesystem read-only", FaultKind.FILE_SYSTEM, 0, "sda1", 0),
        ("XFS (nvme1n1): Corruption of in-memory data detected. Shutting down filesystem",
         FaultKind.FILE_SYSTEM, 0, "nvme1n1", 0),
        ("blk_update_request: I/O error, dev sdb, sector 12345", FaultKind.IO_ERROR, 0, "sdb", 0),
        ("nvme nvme0: I/O 12 QID 3 timeout, aborting", FaultKind.IO_ERROR, 0, "nvme0", 0),
        ("mlx5_core 0000:5e:00.0: poll_health:739:(pid 0): device's health compromised - reached miss count",
         FaultKind.NIC, 0, "0000:5e:00.0", 0),
        ("NETDEV WATCHDOG: eth0 (mlx5_core): transmit queue 3 timed out", FaultKind.NIC, 0, "eth0", 0),
    ],
)  # fmt: skip
def test_lines_of_the_kernel(text: str, kind: str, code: int, component: str, pid: int) -> None:
    book = Book(Ledger("boot"))
    assert book.read(record(7, text), 1000.0, 0.0)
    (fault,) = counts(book)
    assert (fault.kind, fault.code, fault.component, fault.pid, fault.count) == (
        kind,
        code,
        component,
        pid,
        1,
    )
    assert fault.text == text[:240]


def test_other_lines_are_none_of_it() -> None:
    book = Book(Ledger("boot"))
    noise = (
        "EXT4-fs (sda1): mounted filesystem with ordered data mode", "nfs: server filer-7 OK",
        "nvme nvme0: 8/0/0 default/read/poll queues", "NVRM: loading NVIDIA UNIX Open Kernel Module",
        "XFS (sda1): Mounting V5 Filesystem", "usb 1-1: new device",
    )  # fmt: skip
    data = b"".join(record(k, text) for k, text in enumerate(noise))
    assert not book.read(data + b" SUBSYSTEM=pci\n DEVICE=+pci:0000:0f:00.0\n", 1.0, 0.0)
    assert counts(book) == [] and book.ledger.sequence == len(noise) - 1


def test_read_again_is_counted_once() -> None:
    book = Book(Ledger("boot"))
    data = b"".join(xid(k, 45) for k in range(100))
    book.read(data, 1.0, 0.0)
    assert not book.read(data, 2.0, 0.0)
    book.read(data + xid(100, 45), None, 0.0)
    assert [(f.code, f.count) for f in counts(book)] == [(45, 101)]


def test_times_of_what_was_written_before_are_the_kernels() -> None:
    book = Book(Ledger("boot"))
    book.read(xid(1, at_s=100.0) + xid(2, at_s=400.0), None, 50.0)  # its clock is 50 s behind
    (fault,) = counts(book, now=1000.0)
    assert (fault.count, fault.first_age_s, fault.last_age_s) == (2, 850.0, 550.0)


def test_told_by_both_is_counted_once_in_either_order() -> None:
    for first in ("log", "nvml"):
        book = Book(Ledger("boot"))
        for turn in range(2):
            if (turn == 0) == (first == "log"):
                book.read(xid(1), 10.0, 0.0)
            else:
                book.nvml(PCI, 79, 1, 10.2)
        assert [(f.count, f.component) for f in counts(book)] == [(1, "GPU-a")]
        book.nvml(PCI, 79, 1, 90.0)  # another one, which the log does not tell
        assert counts(book)[0].count == 2
        book.nvml("0000:10:00.0", 79, 1, 90.0)  # of another GPU
        assert [f.count for f in counts(book)] == [2, 1]


def test_of_a_burst_the_larger_count_holds() -> None:
    book = Book(Ledger("boot"))
    book.nvml(PCI, 45, 40, 10.0)  # NVML's queue is shorter than the kernel's log
    book.read(b"".join(xid(k, 45) for k in range(1000)), 10.3, 0.0)
    book.nvml(PCI, 45, 60, 10.6)
    assert counts(book)[0].count == 1000


def test_what_nvml_told_before_a_restart_is_known_in_the_log_after_it(tmp_path: Path) -> None:
    clock = ManualClock(now=500.0)
    store = tmp_path / "faults.msgpack"
    before = Watcher(None, store, "boot", clock, lambda _: None)
    before.take(Events(xids=[(PCI, 79, 1)]))  # and killed before it read the log
    clock.advance(90.0)
    then = Watcher(None, store, "boot", clock, lambda _: None)
    then.book.read(xid(3, at_s=100.1), None, 400.0)
    then.keep()
    assert [fault.count for fault in then.faults({}, without=set())] == [1]
    assert Watcher(None, store, "another boot", clock, lambda _: None).faults({}, without=set()) == ()


def test_what_was_not_written_down_is_not_told(tmp_path: Path) -> None:
    told: list[bool] = []
    watcher = Watcher(None, tmp_path / "faults.msgpack", "boot", ManualClock(), told.append)
    watcher.book.read(xid(1), 0.0, 0.0)
    assert watcher.faults({}, without=set()) == ()
    watcher.keep()
    assert len(watcher.faults({}, without=set())) == 1
    for k in range(2, 6):
        watcher.book.read(xid(k), 0.1 * k, 0.0)
        watcher.keep()
    assert told == [True, False, False, False, False], "a flood is told with the next report"
    assert watcher.faults({}, without={PCI}) == (), "another agent's GPU"


def test_a_clock_that_is_set_back_changes_nothing(tmp_path: Path) -> None:
    clock = ManualClock(now=500.0)
    watcher = Watcher(None, tmp_path / "faults.msgpack", "boot", clock, lambda _: None)
    watcher.take(Events(xids=[(PCI, 79, 1)]))
    clock.epoch -= 3600
    clock.advance(10.0)
    watcher.take(Events(xids=[(PCI, 79, 1)]))
    (fault,) = watcher.faults({}, without=set())
    assert (fault.count, fault.first_age_s, fault.last_age_s) == (2, 10.0, 0.0)


def test_a_log_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody who may not read it")
    log = tmp_path / "kmsg"
    log.touch(mode=0o600)
    watcher = Watcher(log, tmp_path / "faults.msgpack", "boot", SystemClock(), lambda _: None)

    async def look() -> None:
        running = asyncio.create_task(watcher.run())
        async with asyncio.timeout(10):
            while "Permission denied" not in watcher.reason:  # noqa: ASYNC110 - in the way that agents see it
                await asyncio.sleep(0.001)
        running.cancel()

    os.seteuid(65534)
    try:
        asyncio.run(look())
    finally:
        os.seteuid(0)
    status = watcher.status("", gpus=True)
    assert status.state == ProbeState.DEGRADED and str(log) in status.reason


def test_the_driver_asks_by_xid_154() -> None:
    book = Book(Ledger("boot"))
    action = "GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)"
    line = f"NVRM: Xid (PCI:0000:0f:00): 154, {action}"
    book.read(record(5, line), 9.0, 0.0)
    assert book.ledger.actions == {PCI: (2, 9.0)}


def test_names_are_bounded() -> None:
    book = Book(Ledger("boot"))
    for k in range(COMPONENTS_MAX + 100):
        book.read(record(k, f"nfs: server filer-{k} not responding, still trying"), 1.0, 0.0)
    found = counts(book)
    assert len(found) == COMPONENTS_MAX + 1 and sum(fault.count for fault in found) == COMPONENTS_MAX + 100


def test_lines_that_the_kernel_wrote_over_are_known_to_be_lost() -> None:
    book = Book(Ledger("boot"))
    book.read(record(100, "the oldest that it still had"), None, 0.0)
    book.read(record(101, "one") + record(111, "another"), 1.0, 0.0)
    assert book.ledger.lost == 9


def test_a_fifo_is_read_as_it_comes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    log = KernelLog(tmp_path / "log")
    assert log.read() == b""
    writer = os.open(tmp_path / "log", os.O_WRONLY | os.O_NONBLOCK)
    try:
        assert log.read() == b""
        os.write(writer, xid(1) + xid(2)[:20])
        assert log.read() == xid(1)  # only whole lines
        os.write(writer, xid(2)[20:])
        assert log.read() == xid(2)
    finally:
        os.close(writer)
        log.close()


def test_others_have_their_turn_while_a_long_log_is_read(tmp_path: Path) -> None:
    """Reports to the controller are among them: in a flood they never wait for more than a piece of it."""
    lines, log = 20_000, tmp_path / "kmsg"
    log.write_bytes(b"".join(xid(k, 45) for k in range(lines)))
    watcher = Watcher(log, tmp_path / "faults.msgpack", "boot", SystemClock(), lambda _: None)
    seen: list[int] = []

    async def turns() -> None:
        running = asyncio.create_task(watcher.run())
        async with asyncio.timeout(60):
            while not seen or seen[-1] < lines:
                seen.append(sum(fault.count for fault in watcher.book.ledger.faults))
                await asyncio.sleep(0)
        running.cancel()

    asyncio.run(turns())
    assert seen[-1] == lines
    assert max(later - before for before, later in itertools.pairwise(seen)) < 1200, seen


def test_the_kernels_own_log_is_in_the_form_that_is_read() -> None:
    try:
        log = KernelLog(Path("/dev/kmsg"))
    except OSError as error:
        pytest.skip(f"/dev/kmsg cannot be read here: {error}")
    try:
        data = log.read()
    finally:
        log.close()
    book = Book(Ledger("boot"))
    book.read(data, None, 0.0)
    assert book.ledger.sequence >= 0 and data.endswith(b"\n")
