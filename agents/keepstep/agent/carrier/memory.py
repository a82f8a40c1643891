"""One rank's memory file, as the carrier handles it: by descriptor, never mapped."""

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from keepstep.core import snapshots
from keepstep.core.errors import InputError, Refused
from keepstep.core.snapshots import PAGE, Shape, Slot, Stamp

NAME = "keepstep-snapshots"
BLOCK = 1 << 18  # bytes that are read or written at once
_generation = count(1)  # of records: both ends of a whole one are equal, that is all


class Memory:
    def __init__(self, descriptor: int, shape: Shape) -> None:
        self.descriptor, self.shape = descriptor, shape

    @classmethod
    def make(cls, shape: Shape, bytes_max: int | None) -> "Memory":
        """Reserved now, so that no later write can fail, with fewer slots where the asked ones do not fit.

        Errors: Refused where there is too little memory even so.
        """
        room = available() // 2
        if bytes_max is not None:
            room = min(room, bytes_max)
        if shape.bytes > room:
            shape = replace(shape, slots=snapshots.LEAST_SLOTS)
        if shape.bytes > room:
            raise Refused(
                f"three slots of rank {shape.rank} need {shape.bytes >> 20} MB",
                why=f"{room >> 20} MB may be used for them on this node",
                next="Snapshots in memory are off; set checkpoint.snapshot_every: never, or use more nodes.",
            )
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, shape.bytes)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in {errno.ENOMEM, errno.ENOSPC}:
                raise
            raise Refused(
                f"three slots of rank {shape.rank} do not fit", why=error.strerror or str(error)
            ) from error
        os.pwrite(descriptor, snapshots.head(shape), 0)
        return cls(descriptor, shape)

    @classmethod
    def given(cls, descriptor: int) -> "Memory":
        """A file that a rank brings along. Errors: InputError if it is none of ours."""
        shape = snapshots.read_shape(os.pread(descriptor, PAGE, 0))
        if shape is None or os.fstat(descriptor).st_size != shape.bytes:
            raise InputError("what was handed over is no memory file of this version")
        return cls(descriptor, shape)

    @property
    def page(self) -> bytes:
        return os.pread(self.descriptor, PAGE, 0)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return snapshots.read_slots(self.page)

    @property
    def stamps(self) -> tuple[Stamp | None, ...]:
        return tuple(slot.at for slot in self.slots)

    @property
    def sealed(self) -> Stamp | None:
        return snapshots.read_sealed(self.page)

    def write_slot(self, number: int, slot: Slot) -> None:
        start, data = snapshots.slot_record(number, slot, next(_generation))
        os.pwrite(self.descriptor, data, start)

    def seal(self, at: Stamp) -> None:
        start, data = snapshots.sealed_record(at, next(_generation))
        os.pwrite(self.descriptor, data, start)

    def acknowledge(self, at: Stamp | None) -> None:
        """For the rank to read; None: it has no buddy."""
        start, data = snapshots.buddy_record(at, next(_generation))
        os.pwrite(self.descriptor, data, start)

    def tell_send(self, ns: int) -> None:
        """For the rank to read: how long its node takes to send one snapshot of all its ranks."""
        start, data = snapshots.send_record(ns)
        os.pwrite(self.descriptor, data, start)

    def stamp(self, stamps: Sequence[Stamp | None]) -> None:
        """Other stamps on the same contents; None drops."""
        for number, (slot, at) in enumerate(zip(self.slots, stamps, strict=True)):
            if slot.at != at:
                self.write_slot(number, _stamped(slot, at) if at is not None else Slot())

    def whole(self, number: int) -> bool:
        """Whether a slot still is what was summed when it was written; drops one that is not."""
        slot = self.slots[number]
        try:
            digest = snapshots.digest(slot.algorithm)
        except KeyError:
            return False
        parts = (
            (self.shape.description_at(number), slot.description_bytes),
            (self.shape.payload_at(number), slot.payload_bytes),
        )
        for start, size in parts:
            for offset in range(start, start + size, BLOCK):
                digest.update(os.pread(self.descriptor, min(BLOCK, start + size - offset), offset))
        if slot.at is not None and digest.hexdigest() == slot.checksum:
            return True
        if self.slots[number] == slot:  # not written anew meanwhile
            self.write_slot(number, Slot())
        return False

    def close(self) -> None:
        """Whoever still has it in hand fails, instead of writing to what gets the number next."""
        os.close(self.descriptor)
        self.descriptor = -1


def available() -> int:
    """Bytes that may still be used here: by the machine, and by the cgroup of this process."""
    found = [int(_field(Path("/proc/meminfo").read_text(), "MemAvailable:")) << 10]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        for folder in _cgroups():
            try:
                found.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return max(0, min(found))


def _cgroups() -> list[Path]:
    """From this process's cgroup up to the root: each may have a limit."""
    root = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            own = root / path.lstrip("/")
            return [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return [root]


def _field(text: str, name: str) -> str:
    return next(line.split()[1] for line in text.splitlines() if line.startswith(name))


def _stamped(slot: Slot, at: Stamp) -> Slot:
    return Slot(
        at=at, description_bytes=slot.description_bytes, payload_bytes=slot.payload_bytes,
        algorithm=slot.algorithm, checksum=slot.checksum,
    )  # fmt: skip
