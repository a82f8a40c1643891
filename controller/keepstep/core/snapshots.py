"""A rank's snapshots in memory: their format, and the rules that rank, carrier and controller share.

Each rank has one memory file without a name: a page, then four slots, or three where memory is scarce. The
rank writes its slots; its node's carrier holds the file too, so it outlives the rank, and sends what is in it
to a buddy node, which keeps three slots of its own for it. Standard library only: this module runs inside
ranks.

    0     magic, version, rank, world size, room for description and payload
    64    what the gang has agreed to be sealed       (written by the rank)
    128   what the buddy has acknowledged             (written by the carrier, or that there is no buddy)
    192   how long sending takes, in nanoseconds      (written by the carrier; 0: not known)
    256   slot records, 128 bytes each: attempt, step, sizes, checksum
    4096  for each slot: the description (JSON), the payload

Why no point is ever lost (tests/property explores all of it for two and three ranks):

* A state is whole before its rank enters the first gradient collective of the next step, so no rank is ever
  more than one step past another's newest whole state.
* Sealed is the newest state that every rank has whole, here and at its buddy: the MIN over what each rank has
  `protected`, made in a reduction that each step needs anyway. Carriers send the oldest state that is not
  sealed yet (`to_send`). That one, what is sealed and the newest are not overwritten: so when a newer state
  is sealed, every rank still has it, and what lies before it is free.
* With four slots what lies between the state that is on its way and the newest one is free, too: each step
  can be kept, however slow the network is, and a kill costs at most the step under way.
* All ranks take the same steps: in the same reduction each says from which sealed state on it has a slot free
  (`frees_at`). Unless the new sealed state is enough for all of them, all skip, and nobody waits. It happens
  with three slots, and right after a restore.
* A restore stamps the state that it used with the new attempt, and drops what is off the chain or past that
  state. What lies before it stays until the new attempt has sealed something: a node that is lost meanwhile
  may need it. Slots are ordered by (attempt, step).

A stamp that a restore has renewed means what it meant before: (N+1, s) is (N, s) where attempt N+1 began
from (N, s). So a restore that reached only some nodes has lost nothing (`origin`).
"""

import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

MAGIC = b"KSSLOTS\0"
VERSION = 1
SLOTS, LEAST_SLOTS = 4, 3
PAGE = 4096

_HEAD = struct.Struct("<8sHHIIIQQ")
_SEALED_AT, _BUDDY_AT, _SEND_AT, _SLOTS_AT, _SLOT_BYTES = 64, 128, 192, 256, 128
_MARK = struct.Struct("<QIIqQ")  # generation, kind, attempt, step, generation
_SLOT = struct.Struct("<QIIqQQ8s16sQ")  # generation, whole, attempt, step, sizes, algorithm, sum, generation
_SEND = struct.Struct("<Q")
NO_BUDDY, BUDDY = 1, 2


class Stamp(NamedTuple):
    """A state of the job: after `step` completed steps, as `attempt` has it. A later attempt sorts last."""

    attempt: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Whose memory file it is, and how much one of its slots holds."""

    rank: int
    world: int
    description_max: int
    payload_max: int
    slots: int = field(default=LEAST_SLOTS, compare=False)  # a file with fewer is as good

    @property
    def stride(self) -> int:
        return _pages(self.description_max) + _pages(self.payload_max)

    @property
    def bytes(self) -> int:
        return PAGE + self.slots * self.stride

    def description_at(self, slot: int) -> int:
        return PAGE + slot * self.stride

    def payload_at(self, slot: int) -> int:
        return self.description_at(slot) + _pages(self.description_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What a slot says that it holds. `at` None: nothing, or something that was never finished."""

    at: Stamp | None = None
    description_bytes: int = 0
    payload_bytes: int = 0
    algorithm: str = ""
    checksum: str = ""


class Page(Protocol):
    """The first page: a map of it in the rank, bytes that were read from it in the carrier."""

    def __getitem__(self, where: slice, /) -> bytes: ...


def head(shape: Shape) -> bytes:
    return _HEAD.pack(
        MAGIC, VERSION, shape.slots, shape.rank, shape.world, 0, shape.description_max, shape.payload_max
    )


def read_shape(page: Page) -> Shape | None:
    """None for what is no memory file of ours, or one of another version."""
    data = page[0 : _HEAD.size]
    if len(data) < _HEAD.size:
        return None
    magic, version, slots, rank, world, _, description, payload = _HEAD.unpack(data)
    if magic != MAGIC or version != VERSION or not LEAST_SLOTS <= slots <= SLOTS:
        return None
    return Shape(rank=rank, world=world, description_max=description, payload_max=payload, slots=slots)


def read_slots(page: Page) -> tuple[Slot, ...]:
    shape = read_shape(page)
    return tuple(_read_slot(page, k) for k in range(shape.slots if shape else 0))


def slot_record(number: int, slot: Slot, generation: int) -> tuple[int, bytes]:
    """Where the record of a slot goes, and its bytes; the generation is another one at each writing."""
    at = slot.at or Stamp(0, -1)
    data = _SLOT.pack(
        generation,
        slot.at is not None,
        at.attempt,
        at.step,
        slot.description_bytes,
        slot.payload_bytes,
        slot.algorithm.encode(),
        slot.checksum.encode(),
        generation,
    )
    return _SLOTS_AT + number * _SLOT_BYTES, data


def sealed_record(at: Stamp, generation: int) -> tuple[int, bytes]:
    return _SEALED_AT, _MARK.pack(generation, BUDDY, at.attempt, at.step, generation)


def buddy_record(at: Stamp | None, generation: int) -> tuple[int, bytes]:
    """The newest state that the buddy acknowledged; None: there is no buddy, so what is here is all."""
    attempt, step = at or Stamp(0, -1)
    kind = NO_BUDDY if at is None else BUDDY
    return _BUDDY_AT, _MARK.pack(generation, kind, attempt, step, generation)


def send_record(ns: int) -> tuple[int, bytes]:
    """What it takes to send one snapshot of all ranks of this node to the buddy."""
    return _SEND_AT, _SEND.pack(ns)


def read_send(page: Page) -> int:
    """0: not known."""
    found: int = _SEND.unpack(page[_SEND_AT : _SEND_AT + _SEND.size])[0]
    return found


def read_sealed(page: Page) -> Stamp | None:
    return _read_mark(page, _SEALED_AT)[1]


def read_buddy(page: Page) -> tuple[int, Stamp | None]:
    """NO_BUDDY, or BUDDY with what it acknowledged; 0 before the carrier has said anything."""
    return _read_mark(page, _BUDDY_AT)


# ---------------------------------------------------------------- the rules

Parents = Mapping[int, Stamp | None]  # from which state each attempt began; None: from nothing


def free_slot(slots: Sequence[Stamp | None], sealed: Stamp | None, attempt: int | None = None) -> int | None:
    """Which slot may be written: an empty one, else the oldest of those before `sealed`; None: skip.

    `attempt`: of the rank that writes. With more than three slots it may also give up what lies between the
    state that is on its way to the buddy and the newest one.
    """
    free = [(at or Stamp(0, -1), k) for k, at in enumerate(slots) if at is None or (sealed and at < sealed)]
    if not free and attempt is not None and len(slots) > LEAST_SLOTS:
        free = [(at, slots.index(at)) for at in _unsealed(slots, sealed, attempt)[1:-1]]
    return min(free)[1] if free else None


def to_send(slots: Sequence[Stamp | None], sealed: Stamp | None, attempt: int) -> Stamp | None:
    """The state that the buddy is to have next. The same one for all ranks, so that it can be sealed."""
    return next(iter(_unsealed(slots, sealed, attempt)), None)


def frees_at(slots: Sequence[Stamp | None], sealed: Stamp | None, attempt: int) -> int:
    """The step that must be sealed, at least, for a slot to be free; -1: one is."""
    if free_slot(slots, sealed, attempt) is not None:
        return -1
    return min(at.step for at in slots if at is not None) + 1


def _unsealed(slots: Sequence[Stamp | None], sealed: Stamp | None, attempt: int) -> list[Stamp]:
    """The attempt's own states, the oldest first."""
    return sorted(at for at in slots if at and at.attempt == attempt and (sealed is None or at > sealed))


def protected(slots: Iterable[Stamp | None], attempt: int, buddy: tuple[int, Stamp | None]) -> int:
    """The newest step of this attempt that a rank has twice, here and at its buddy; -1: none.

    Where there is no buddy, having it once is all there is.
    """
    kind, acknowledged = buddy
    steps = [at.step for at in slots if at is not None and at.attempt == attempt]
    if kind == BUDDY:
        newest = acknowledged.step if acknowledged and acknowledged.attempt == attempt else -1
        steps = [step for step in steps if step <= newest]
    return max(steps, default=-1) if kind else -1


def origin(at: Stamp, parents: Parents) -> Stamp:
    """The stamp of the attempt that made a state, however often restores have renewed it."""
    while (parent := parents.get(at.attempt)) is not None and at.step == parent.step:
        if parent.attempt >= at.attempt:
            break  # a lineage that does not go back in time is not followed
        at = parent
    return at


def on_chain(at: Stamp, attempt: int, parents: Parents) -> bool:
    """Whether `attempt` has come from a state: it may be restored by what follows."""
    made = origin(at, parents)
    limit: int | None = None
    while made.attempt != attempt:
        parent = parents.get(attempt)
        if parent is None or parent.attempt >= attempt:
            return False
        attempt = parent.attempt
        limit = parent.step if limit is None else min(limit, parent.step)
    return limit is None or made.step <= limit


def after_restore(
    slots: Sequence[Stamp | None], attempt: int, parents: Parents, sealed: Stamp | None
) -> tuple[Stamp | None, ...]:
    """The stamps once `attempt` has begun from its parent's state, which is in memory.

    That state is the attempt's own now; what is off the chain or past it is dropped, and what lies before
    `sealed`, which the gang agreed on earlier. Doing it again changes nothing. `parents` has the attempt's.
    """
    began = parents.get(attempt)
    point = None if began is None else origin(began, parents)
    floor = sealed.step if sealed is not None and on_chain(sealed, attempt, parents) else -1
    kept: list[Stamp | None] = []
    for at in slots:
        stamp = at
        if at is not None and at.attempt != attempt:
            if point is not None and origin(at, parents) == point:
                stamp = Stamp(attempt, at.step)
            elif not on_chain(at, attempt, parents) or at.step < floor:
                stamp = None
        kept.append(None if stamp in kept else stamp)  # one state under two stamps: once is enough
    return tuple(kept)


# ---------------------------------------------------------------- checksums


class Digest(Protocol):
    def update(self, data: bytes | bytearray | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def algorithms() -> tuple[str, ...]:
    """What this process can compute, the preferred one first."""
    try:
        import xxhash  # noqa: F401
    except ImportError:  # a script's own environment need not have it
        return ("crc32",)
    return ("xxh3", "crc32")


def digest(algorithm: str) -> Digest:
    """Errors: KeyError for an algorithm of a newer version, or one that is not installed here."""
    if algorithm not in algorithms():
        raise KeyError(algorithm)
    if algorithm == "crc32":
        return _Crc32()
    import xxhash

    made: Callable[[], Digest] = xxhash.xxh3_64
    return made()


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def _read_slot(page: Page, number: int) -> Slot:
    start = _SLOTS_AT + number * _SLOT_BYTES
    first, whole, attempt, step, description, payload, algorithm, checksum, last = _SLOT.unpack(
        page[start : start + _SLOT.size]
    )
    if first != last or not whole:
        return Slot()
    return Slot(
        at=Stamp(attempt, step),
        description_bytes=description,
        payload_bytes=payload,
        algorithm=algorithm.rstrip(b"\0").decode(),
        checksum=checksum.rstrip(b"\0").decode(),
    )


def _read_mark(page: Page, start: int) -> tuple[int, Stamp | None]:
    first, kind, attempt, step, last = _MARK.unpack(page[start : start + _MARK.size])
    if first != last or kind == 0:
        return 0, None
    return kind, Stamp(attempt, step) if step >= 0 else None


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
