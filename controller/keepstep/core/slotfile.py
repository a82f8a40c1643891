"""One slot of a rank's memory file as a file of a checkpoint. Standard library only.

    0      head and slot record, as in a memory file (core.snapshots)
    4096   the description (JSON), which says what lies where in the payload; at the next page the payload

What a carrier has is written as it is, summed up again while it is read: a slot that is not what its rank
has summed is not stored.
"""

import json
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keepstep.core import durable, snapshots
from keepstep.core.errors import InputError
from keepstep.core.manifest import File
from keepstep.core.snapshots import PAGE, Shape, Slot, Stamp

_BLOCK = 1 << 20
SUFFIX = ".slot"


def name_of(rank: int) -> str:
    return f"rank-{rank:05d}{SUFFIX}"


@dataclass(frozen=True, slots=True)
class Source:
    """A slot in a memory file; the descriptor is the caller's to keep open."""

    descriptor: int
    shape: Shape
    number: int
    slot: Slot

    def _blocks(self) -> Iterator[tuple[bytes, int]]:
        """Its bytes, each block with what pads it to whole pages."""
        for start, size in (
            (self.shape.description_at(self.number), self.slot.description_bytes),
            (self.shape.payload_at(self.number), self.slot.payload_bytes),
        ):
            for offset in range(start, start + size, _BLOCK):
                yield os.pread(self.descriptor, min(_BLOCK, start + size - offset), offset), 0
            yield b"", -size % PAGE

    @property
    def description(self) -> dict[str, Any]:
        data = os.pread(self.descriptor, self.slot.description_bytes, self.shape.description_at(self.number))
        found: dict[str, Any] = json.loads(data)
        return found

    def write(self, folder: Path, at: Stamp, *, by: str) -> File:
        """Store it, stamped `at`. Whole or not there; synced, but for the folder.

        `by`: a name of the writer that no other has, on whatever machine; it does one at a time.

        Errors: OSError (a full disk), InputError for a slot that is not what was summed when it was taken.
        """
        shape = Shape(
            rank=self.shape.rank, world=self.shape.world, description_max=self.slot.description_bytes,
            payload_max=self.slot.payload_bytes,
        )  # fmt: skip
        stamped = Slot(
            at=at, description_bytes=self.slot.description_bytes, payload_bytes=self.slot.payload_bytes,
            algorithm=self.slot.algorithm, checksum=self.slot.checksum,
        )  # fmt: skip
        page = bytearray(PAGE)
        for start, data in ((0, snapshots.head(shape)), snapshots.slot_record(0, stamped, 1)):
            page[start : start + len(data)] = data
        content, whole = snapshots.digest(self.slot.algorithm), snapshots.digest("xxh3")
        path = folder / name_of(shape.rank)
        draft = path.with_name(f".{path.name}.{by}")
        try:
            with draft.open("wb", buffering=0) as file:
                _write(file.fileno(), page)
                whole.update(page)
                for data, padding in self._blocks():
                    content.update(data)
                    for part in (data, bytes(padding)):
                        _write(file.fileno(), part)
                        whole.update(part)
                if content.hexdigest() != self.slot.checksum:
                    raise InputError(f"step {at.step} of rank {shape.rank} is damaged in memory")
                os.fsync(file.fileno())
            draft.rename(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise
        return File(bytes=PAGE + shape.stride, xxh3=whole.hexdigest())


@dataclass(frozen=True, slots=True)
class Saved:
    """A slot's file, mapped: what is in it is read when it is used."""

    shape: Shape
    slot: Slot
    text: bytes  # the description
    payload: memoryview

    @property
    def description(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def roomy(self) -> Shape:
        """Of a memory file for it, with room for a description that grows."""
        room = max(1 << 16, 2 * len(self.text))
        return replace(self.shape, description_max=room)


def read(path: Path) -> Saved:
    """A file of a checkpoint that was verified. Errors: InputError for what is no such file."""
    with path.open("rb") as file:
        page = file.read(PAGE)
        shape = snapshots.read_shape(page)
        slot = snapshots.read_slots(page)[0] if shape is not None else Slot()
        if shape is None or slot.at is None or os.fstat(file.fileno()).st_size != PAGE + shape.stride:
            raise InputError(
                "is no slot of a snapshot that this version reads", where=str(path),
                next="Restore an older checkpoint of the same job.",
            )  # fmt: skip
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    start, payload = shape.description_at(0), shape.payload_at(0)
    text = bytes(memory[start : start + slot.description_bytes])
    return Saved(shape, slot, text, memory[payload : payload + slot.payload_bytes])


def sync(folder: Path) -> None:
    """What was renamed into a checkpoint's folder, and the folder itself, survive a power cut."""
    durable.sync_folder(folder)
    durable.sync_folder(folder.parent)


def _write(descriptor: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
