"""A rank's beacon: one page of shared memory that says where the rank is.

The rank writes it without a system call (about a quarter of a microsecond); the agent reads it at any time,
also of a rank that is stopped in the middle of a write, because two records alternate and each carries its
sequence number at both ends. The page is a memfd that the shim makes, so it has no name and nothing is left
of it when the last holder is gone. Standard library only: this module runs inside ranks.

    0     magic, version, pid, rank, world size
    24    how long the rank waited for its neighbours in a pipeline
    64    record A        (the writer alternates; the reader takes the newest whole one)
    256   record B
    448   a table by phase: how often it was completed, how long that took
    1600  ring of the last 39 completed steps, for the loss curve
"""

import mmap
import os
import struct
import time
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"KSBEACON"
VERSION = 2
PAGE = 4096

_HEAD = struct.Struct("<8sHxxIII")
_BUBBLE = 24
_RECORD = struct.Struct("<QqQIIQQQQqqqQQQQ16sQQ")
_RECORDS = (64, 256)
_TABLE, _ROWS, _ROW = 448, 12, 96
_SEEN = struct.Struct("<QQQQ")  # completed, sum, waited, longest; then the bins
_SEEN_HALVES = _SEEN.size // 2
BINS = 32
_POINT = struct.Struct("<QQdddddQ")
_RING, _RING_SIZE = 1600, 39


class Phase(IntEnum):
    """What a rank is doing; the time since it entered is what hangs are judged by."""

    NONE = 0
    STARTING = 1
    RENDEZVOUS = 2
    RESTORING = 3
    DATA = 4
    FORWARD = 5
    BACKWARD = 6
    OPTIMIZER = 7
    CHECKPOINT = 8
    EVALUATION = 9
    FINISHED = 10
    COLLECTING = 11  # Python's garbage, in the midst of any other phase: counted beside them, never entered
    UNKNOWN = 255


class Trouble(IntEnum):
    """What a rank found wrong with its own numbers. The graver one stays."""

    NONE = 0
    NOT_FINITE = 1  # loss or gradient of the whole job
    NOT_FINITE_HERE = 2  # this rank's own gradient
    REPLICA_DIFFERS = 3  # its weights are not those of most other replicas
    WEIGHTS_CHANGED = 4  # between two updates
    STATE_CHANGED = 5  # the owned part of weights and moments, between two updates

    @classmethod
    def of(cls, word: str) -> "Trouble":
        return cls.__members__.get(word.upper(), cls.NONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One state of a rank. Times are nanoseconds of this machine's monotonic clock."""

    sequence: int = 0
    step: int = -1  # completed optimizer steps of the job; -1: never seen to step
    micro_batch: int = 0
    phase: Phase = Phase.NONE
    phase_ns: int = 0  # when the phase was entered
    step_ns: int = 0  # when the last step was completed
    launched: int = 0  # collectives and sends started ...
    completed: int = 0  # ... and finished: any counter that moves is progress
    checkpoint_step: int = -1  # of the newest checkpoint that this rank knows to be complete
    snapshot_step: int = -1  # of its newest whole snapshot in memory
    peer: int = -1  # the pipeline peer that the rank waits for
    stall_ns: int = 0  # training time lost to checkpoints and snapshots, in all
    wait_ns: int = 0  # spent waiting for other ranks, in all
    waiting_ns: int = 0  # since when it waits for them; 0: it does not
    batches: int = 0  # that its data loader gave
    group: str = ""  # the group that the rank waits in, or waited in last, 15 bytes
    group_sequence: int = 0
    trouble: Trouble = Trouble.NONE
    trouble_step: int = 0  # modulo 2^24


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """How long one phase took whenever it was completed. `bins`: see `bin_of`, halved when one is full."""

    count: int
    total_ns: int
    waited_ns: int  # of the total, for other ranks
    longest_ns: int
    bins: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One completed step, for the loss curve."""

    step: int
    at_ns: int
    loss: float
    grad_norm: float
    tokens_per_s: float  # of the whole job
    tflops: float  # per GPU (slot)
    mfu: float  # nan where no peak is known


class BeaconWriter:
    """The rank's side. One writer, one thread.

    A page that was written before is continued: its newest record counts on, so that a program that follows
    another one in the same rank is not taken for the older of the two.
    """

    def __init__(self, page: mmap.mmap, *, rank: int, world_size: int) -> None:
        assert len(page) == PAGE
        self._page = page
        before = BeaconReader(page).read()
        self._sequence = before.sequence if before else 0
        self.now = before or Record()
        _HEAD.pack_into(page, 0, MAGIC, VERSION, os.getpid(), rank, world_size)
        table = memoryview(page)[_TABLE : _TABLE + _ROWS * _ROW]
        self._sums, self._bins = table.cast("Q"), table.cast("H")
        self._bubble = memoryview(page)[_BUBBLE : _BUBBLE + 8].cast("Q")

    def write(self, record: Record) -> None:
        """Publish a state; its sequence number is set here."""
        self.now = r = record
        self.put(
            r.step,
            r.micro_batch,
            r.phase,
            r.phase_ns,
            r.step_ns,
            r.launched,
            r.completed,
            r.checkpoint_step,
            r.snapshot_step,
            r.peer,
            r.stall_ns,
            r.wait_ns,
            r.waiting_ns,
            r.batches,
            r.group.encode()[:15],
            r.group_sequence,
            r.trouble | r.trouble_step << 8,
        )

    def put(
        self,
        step: int,
        micro_batch: int,
        phase: int,
        phase_ns: int,
        step_ns: int,
        launched: int,
        completed: int,
        checkpoint_step: int,
        snapshot_step: int,
        peer: int,
        stall_ns: int,
        wait_ns: int,
        waiting_ns: int,
        batches: int,
        group: bytes,
        group_sequence: int,
        trouble: int = 0,
    ) -> None:
        """Publish a state without making an object of it: what a rank does thousands of times a second."""
        sequence = self._sequence = self._sequence + 1
        _RECORD.pack_into(
            self._page,
            _RECORDS[sequence & 1],
            sequence,
            step,
            micro_batch,
            phase,
            trouble,
            phase_ns,
            step_ns,
            launched,
            completed,
            checkpoint_step,
            snapshot_step,
            peer,
            stall_ns,
            wait_ns,
            waiting_ns,
            batches,
            group,
            group_sequence,
            sequence,
        )

    def passed(self, phase: int, ns: int, waited_ns: int = 0) -> None:
        """A phase was completed after `ns`, `waited_ns` of them spent waiting for other ranks."""
        if phase >= _ROWS:
            return
        sums, at = self._sums, phase * (_ROW // 8)  # in place: what a rank does thousands of times a second
        sums[at] += 1
        sums[at + 1] += ns
        if waited_ns:
            sums[at + 2] += waited_ns
        if ns > sums[at + 3]:  # noqa: PLR1730 - `max` takes twice the time
            sums[at + 3] = ns
        bins, first = self._bins, phase * (_ROW // 2) + _SEEN_HALVES
        k = first + (bin_of(ns) if ns >> 20 else 0)
        if bins[k] == 0xFFFF:  # older durations count less, so a drift is followed
            for each in range(first, first + BINS):
                bins[each] >>= 1
        bins[k] += 1

    def bubble(self, ns: int) -> None:
        """So long a wait was for a neighbour in a pipeline."""
        self._bubble[0] += ns

    def point(self, point: Point) -> None:
        """Add a completed step to the ring; the step is written last, so a torn entry is not taken."""
        offset = _RING + (point.step % _RING_SIZE) * _POINT.size
        mark = point.step + 1
        self._page[offset : offset + 8] = bytes(8)
        _POINT.pack_into(
            self._page, offset, 0, point.at_ns, point.loss, point.grad_norm, point.tokens_per_s,
            point.tflops, point.mfu, mark,
        )  # fmt: skip
        struct.pack_into("<Q", self._page, offset, mark)


class BeaconReader:
    """The agent's side."""

    def __init__(self, page: mmap.mmap) -> None:
        self._page = page

    @classmethod
    def of_descriptor(cls, descriptor: int) -> "BeaconReader":
        return cls(mmap.mmap(descriptor, PAGE, prot=mmap.PROT_READ))

    def read(self) -> Record | None:
        """The newest whole record; None before the first one or for a page of another version."""
        magic, version, *_ = _HEAD.unpack_from(self._page, 0)
        if magic != MAGIC or version != VERSION:
            return None
        best: Record | None = None
        for offset in _RECORDS:
            (
                first,
                step,
                micro,
                phase,
                trouble,
                phase_ns,
                step_ns,
                launched,
                completed,
                checkpoint,
                snapshot,
                peer,
                stall,
                wait,
                waiting,
                batches,
                group,
                group_sequence,
                last,
            ) = _RECORD.unpack_from(self._page, offset)
            if first == 0 or first != last or (best and best.sequence > first):
                continue
            best = Record(
                sequence=first,
                step=step,
                micro_batch=micro,
                phase=_phase(phase),
                phase_ns=phase_ns,
                step_ns=step_ns,
                launched=launched,
                completed=completed,
                checkpoint_step=checkpoint,
                snapshot_step=snapshot,
                peer=peer,
                stall_ns=stall,
                wait_ns=wait,
                waiting_ns=waiting,
                batches=batches,
                group=group.rstrip(b"\0").decode(errors="replace"),
                group_sequence=group_sequence,
                trouble=_trouble(trouble & 0xFF),
                trouble_step=trouble >> 8,
            )
        return best

    def phases(self) -> dict[Phase, Seen]:
        """What was completed so far. Sums may be one completion apart from the count: nothing is locked."""
        magic, version, *_ = _HEAD.unpack_from(self._page, 0)
        if magic != MAGIC or version != VERSION:
            return {}
        found = {}
        for phase in range(_ROWS):
            row = _TABLE + phase * _ROW
            count, total, waited, longest = _SEEN.unpack_from(self._page, row)
            if count:
                bins = struct.unpack_from(f"<{BINS}H", self._page, row + _SEEN.size)
                found[_phase(phase)] = Seen(
                    count=count, total_ns=total, waited_ns=waited, longest_ns=longest, bins=bins
                )
        return found

    def bubble_ns(self) -> int:
        """What the rank waited for its neighbours in a pipeline, in all; 0 where nobody tells it."""
        magic, version, *_ = _HEAD.unpack_from(self._page, 0)
        if magic != MAGIC or version != VERSION:
            return 0
        (bubble,) = struct.unpack_from("<Q", self._page, _BUBBLE)
        return int(bubble)

    def points(self, after_step: int) -> list[Point]:
        """The completed steps past `after_step` that are still in the ring, oldest first."""
        found = []
        for k in range(_RING_SIZE):
            first, at, loss, norm, tokens, tflops, mfu, last = _POINT.unpack_from(
                self._page, _RING + k * _POINT.size
            )
            if first == last and first - 1 > after_step:
                found.append(
                    Point(
                        step=first - 1,
                        at_ns=at,
                        loss=loss,
                        grad_norm=norm,
                        tokens_per_s=tokens,
                        tflops=tflops,
                        mfu=mfu,
                    )
                )
        return sorted(found, key=lambda point: point.step)

    def close(self) -> None:
        self._page.close()


def bin_of(ns: int) -> int:
    """Half octaves from about a millisecond on: bin 0 is below 1.05 ms, the last one above 34 s."""
    units = ns >> 20
    if units == 0:
        return 0
    high = units.bit_length() - 1
    k = 1 + 2 * high + (units >> (high - 1) & 1 if high else ns >> 19 & 1)
    return k if k < BINS else BINS - 1


def bin_edge_s(k: int) -> float:
    """The upper edge of a bin, in seconds; infinite for the last one."""
    if k >= BINS - 1:
        return float("inf")
    high, half = divmod(k - 1, 2) if k else (0, -1)
    return (1 << 20 + high) * (1.5 + 0.5 * half) / 1e9


def writer_of(page: mmap.mmap) -> int:
    """The process that writes a page; 0 where nobody did yet."""
    magic, version, pid, *_ = _HEAD.unpack_from(page, 0)
    return int(pid) if magic == MAGIC and version == VERSION else 0


def age_s(at_ns: int, now_ns: int | None = None) -> float | None:
    """Seconds since a moment of a beacon, or None if it never came."""
    if at_ns == 0:
        return None
    return max(0, (time.monotonic_ns() if now_ns is None else now_ns) - at_ns) / 1e9


def _trouble(code: int) -> Trouble:
    try:
        return Trouble(code)
    except ValueError:
        return Trouble.NONE  # of a newer writer


def _phase(code: int) -> Phase:
    try:
        return Phase(code)
    except ValueError:
        return Phase.UNKNOWN  # of a newer writer
