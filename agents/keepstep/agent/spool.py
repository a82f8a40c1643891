"""Events on disk until the controller has them: numbered, bounded, and honest about what was lost.

Segments of frames (length, CRC, msgpack), each named by the number of its first event. Appending does not
sync: a killed agent loses nothing, since the page cache stays; a machine that goes down may lose the last
seconds, and its next boot skips ahead in numbers so that none is ever used for two events. Whatever is
missing, for whichever reason, shows as one `gap` event in its place.
"""

import logging
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from keepstep.core import durable
from keepstep.core.clock import Clock
from keepstep.wire.messages import Event

_log = logging.getLogger("keepstep.agent")
_FRAME = struct.Struct("<II")
_SKIP_AFTER_BOOT = 100_000  # more events than can be written between two syncs of the kernel
_FRAME_BYTES_MAX = 256 << 10


class Stored(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An event as it lies on disk: the moment instead of the age."""

    number: int
    kind: str
    at: float  # of the monotonic clock of `boot`
    boot: str
    job: str = ""
    attempt: int = 0
    data: dict[str, Any] = {}

    def event(self, now: float, boot: str) -> Event:
        same = self.boot == boot
        return Event(
            number=self.number, kind=self.kind,
            age_s=max(0.0, now - self.at) if same else 0.0, same_boot=same, job=self.job,
            attempt=self.attempt, data=self.data,
        )  # fmt: skip


@dataclass(slots=True)
class _Segment:
    path: Path
    first: int
    last: int  # first - 1: empty
    bytes: int


class Spool:
    """One writer, one reader, one process (the folder's lock sees to that)."""

    def __init__(self, folder: Path, *, clock: Clock, boot: str, bytes_max: int = 16 << 20) -> None:
        self._folder, self._clock, self._boot = folder, clock, boot
        self._bytes_max, self._segment_bytes = bytes_max, max(4096, bytes_max // 16)
        self._acknowledged = _read_number(folder / "acknowledged")
        self._segments = [_scan(path, first) for first, path in sorted(_named(folder))]
        if self._segments:
            self._file = self._segments[-1].path.open("ab")
        else:
            self._new_segment(self._acknowledged + 1)
        self._after_another_boot()

    @property
    def last(self) -> int:
        """The newest event's number; 0 before the first one."""
        return self._segments[-1].last

    @property
    def acknowledged(self) -> int:
        return self._acknowledged

    @property
    def first(self) -> int:
        """The oldest event that is still to be sent, or the next one's number."""
        return self._acknowledged + 1

    def append(
        self, kind: str, *, job: str = "", attempt: int = 0, data: dict[str, Any] | None = None
    ) -> int:
        """Number and keep an event. A full disk loses it, which will show as a gap."""
        number = self.last + 1
        payload = msgspec.msgpack.encode(
            Stored(
                number=number, kind=kind, at=self._clock.monotonic(), boot=self._boot,
                job=job, attempt=attempt, data=data or {},
            )
        )  # fmt: skip
        assert len(payload) <= _FRAME_BYTES_MAX, f"an event of {len(payload)} bytes: {kind}"
        if self._segments[-1].bytes >= self._segment_bytes:
            self._new_segment(number)
        segment = self._segments[-1]
        frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            self._file.write(frame)
            self._file.flush()
        except OSError as error:
            _log.warning("event %d (%s) is lost: %s", number, kind, error)
            self._rewind(segment)
        else:
            segment.bytes += len(frame)
        segment.last = number
        self._bound()
        return number

    def batch(self, *, events: int = 64, bytes_max: int = 256 << 10) -> tuple[Event, ...]:
        """The oldest unacknowledged events in order, gaps included; () when all are acknowledged."""
        found: list[Event] = []
        now, size = self._clock.monotonic(), 0
        expected = self._acknowledged + 1
        for stored, length in self._unacknowledged():
            if len(found) >= events or (found and size + length > bytes_max):
                return tuple(found)
            if stored.number > expected:
                found.append(_gap(expected, stored.number - 1))
            found.append(stored.event(now, self._boot))
            size += length
            expected = stored.number + 1
        if expected <= self.last and len(found) < events:
            found.append(_gap(expected, self.last))
        return tuple(found)

    def acknowledge(self, number: int) -> None:
        """The controller has stored everything up to here; also what it already had before we came back."""
        if number <= self._acknowledged:
            return
        if number > self.last:
            # The disk forgot what the controller remembers (a power cut): no number may be used twice.
            self._new_segment(number + 1)
        self._acknowledged = number
        # What is not on the disk at a power cut is sent again, and the controller knows it by its number.
        durable.write(self._folder / "acknowledged", f"{number}\n".encode(), sync=False)
        while len(self._segments) > 1 and self._segments[0].last <= number:
            self._segments.pop(0).path.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()

    # -- segments

    def _unacknowledged(self) -> Iterator[tuple[Stored, int]]:
        for segment in self._segments:
            if segment.last > self._acknowledged:
                for stored, length in _frames(segment.path):
                    if stored.number > self._acknowledged:
                        yield stored, length

    def _new_segment(self, first: int) -> None:
        path = self._folder / f"{first:012d}.events"
        if self._segments:
            self._file.close()
        self._file = path.open("ab")
        self._segments.append(_Segment(path=path, first=first, last=first - 1, bytes=0))

    def _rewind(self, segment: _Segment) -> None:
        """Take half a frame away that a full disk left."""
        self._file.close()
        os.truncate(segment.path, segment.bytes)
        self._file = segment.path.open("ab")

    def _bound(self) -> None:
        while len(self._segments) > 1 and sum(s.bytes for s in self._segments) > self._bytes_max:
            lost = self._segments.pop(0)
            lost.path.unlink(missing_ok=True)
            _log.warning("the spool is full: events %d to %d are given up", lost.first, lost.last)

    def _after_another_boot(self) -> None:
        boots = [stored.boot for stored, _ in _frames(self._segments[-1].path)]
        if boots and boots[-1] != self._boot:
            self._new_segment(self.last + _SKIP_AFTER_BOOT)


def _gap(first: int, last: int) -> Event:
    """Stands in the place of the last one that is missing."""
    text = f"events {first} to {last} are lost" if last > first else f"event {first} is lost"
    return Event(number=last, kind="gap", same_boot=False, data={"first": first, "last": last, "text": text})


def _named(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("*.events"):
        if path.stem.isdecimal():
            yield int(path.stem), path


def _scan(path: Path, first: int) -> _Segment:
    """Find the end of a segment, and cut off what a crash left half-written."""
    last, size = first - 1, 0
    for stored, length in _frames(path):
        last, size = stored.number, size + length
    if path.stat().st_size > size:
        os.truncate(path, size)
    return _Segment(path=path, first=first, last=last, bytes=size)


def _frames(path: Path) -> Iterator[tuple[Stored, int]]:
    """The whole frames of a segment, up to the first that is not."""
    content = path.read_bytes()
    at = 0
    while at + _FRAME.size <= len(content):
        length, crc = _FRAME.unpack_from(content, at)
        payload = content[at + _FRAME.size : at + _FRAME.size + length]
        if len(payload) < length or length > _FRAME_BYTES_MAX or zlib.crc32(payload) != crc:
            return
        try:
            stored = msgspec.msgpack.decode(payload, type=Stored)
        except msgspec.MsgspecError:
            return
        yield stored, _FRAME.size + length
        at += _FRAME.size + length


def _read_number(path: Path) -> int:
    try:
        return int(path.read_bytes())
    except (FileNotFoundError, ValueError):  # empty after a power cut
        return 0
