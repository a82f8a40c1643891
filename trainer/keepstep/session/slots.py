"""A rank's own slots: written here, held by the carrier (see core.snapshots for why nothing is lost).

One thread, in this order:

    resume(step)                            the state that the attempt begins from is in a slot
    says -> MIN over all ranks -> heard     in a reduction of each step, before its update
    due(step)                               where the interval is not given: alike on all ranks
    begin(step) ... finish(...)             after the update; finished before the next gradient collective
"""

import logging
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from keepstep.core import snapshots
from keepstep.core.cadence import Costs
from keepstep.core.errors import KeepstepError, Unreachable
from keepstep.core.snapshots import PAGE, Shape, Slot, Stamp
from keepstep.session.carrier import FOLDER, Carrier

_log = logging.getLogger("keepstep.snapshots")
_POPULATE_WRITE = 23  # madvise: fault the pages in now, so that the first copy is as fast as any
_REJOIN_S, _AGAIN_S = 1.0, 1.0
NEVER = -(10.0**15)  # of a rank without slots: nothing is protected, and nothing may be taken
Says = tuple[float, float, float]
NOTHING: Says = (-1.0, NEVER, -1.0)  # of a rank without slots


class Slots:
    def __init__(self, carrier: Carrier, attempt: int, descriptor: int) -> None:
        shape = snapshots.read_shape(os.pread(descriptor, PAGE, 0))
        assert shape is not None  # the carrier has just made it
        self.shape, self.attempt = shape, attempt
        self._carrier, self._descriptor = carrier, descriptor
        self._memory = mmap.mmap(descriptor, shape.bytes)
        try:
            self._memory.madvise(_POPULATE_WRITE)
        except OSError as error:  # an older kernel: the first copies fault the pages in
            _log.info("slots are not populated ahead: %s", error)
        self._stamps = [slot.at for slot in snapshots.read_slots(self._memory)]
        self.sealed: Stamp | None = None
        self._clear = False  # everybody has a slot free for the next snapshot
        self._writing: tuple[int, int] | None = None  # slot, step
        self._costs, self._heard_s = Costs(), 0.0
        self._every, self._last = 1, -1  # the interval that the ranks agreed on; the last step that was kept
        self._again_s = 0.0  # when another carrier is looked for
        self._generation = 0
        self._algorithm = snapshots.algorithms()[0]

    @classmethod
    def open(
        cls, environ: Mapping[str, str], *, rank: int, world: int, attempt: int, description_max: int,
        payload_max: int,
    ) -> "Slots | None":  # fmt: skip
        """None, with a warning, where there is no carrier or too little memory: the job runs without."""
        folder = environ.get(FOLDER)
        if not folder:
            return None
        carrier = Carrier(Path(folder))
        try:
            _, files = carrier.ask(
                do="join", rank=rank, world=world, attempt=attempt, description_max=description_max,
                payload_max=payload_max,
            )  # fmt: skip
            return cls(carrier, attempt, files[0])
        except (KeepstepError, OSError) as error:
            carrier.close()
            _log.warning("rank %d keeps no snapshots in memory: %s", rank, error)
            return None

    def payload(self, number: int) -> memoryview:
        start = self.shape.payload_at(number)
        return memoryview(self._memory)[start : start + self.shape.payload_max]

    @property
    def says(self) -> Says:
        """What goes into the MIN: what is protected; negative: what must be sealed for a free slot, and the
        interval that this rank can afford."""
        buddy = snapshots.read_buddy(self._memory)
        return (
            float(snapshots.protected(self._stamps, self.attempt, buddy)),
            -float(snapshots.frees_at(self._stamps, self.sealed, self.attempt)),
            -float(self._costs.interval),
        )

    def heard(self, least: Says) -> None:
        """What came out of the MIN."""
        sealed = Stamp(self.attempt, int(least[0]))
        if sealed.step >= 0 and (self.sealed is None or sealed > self.sealed):
            self.sealed = sealed
            self._put(*snapshots.sealed_record(sealed, self._next()))
            if snapshots.to_send(self._stamps, sealed, self.attempt) is not None:
                self._carrier.nudge()  # it has waited for this
        self._clear = -least[1] <= (self.sealed.step if self.sealed else -1)
        self._every = max(1, int(-least[2]))
        now = time.monotonic()
        if self._heard_s:
            self._costs.steps.append(now - self._heard_s)
        self._heard_s = now
        send_ns = snapshots.read_send(self._memory)
        if send_ns:
            self._costs.sends.append(send_ns / 1e9)
        else:
            self._costs.sends.clear()

    def due(self, step: int) -> bool:
        """Whether the agreed interval has passed."""
        return step - self._last >= self._every

    def stalled(self, seconds: float) -> None:
        """What a copy has cost the rank."""
        self._costs.stalls.append(seconds)

    def resume(self, step: int) -> bool:
        """Whether the state that the attempt begins from is in a slot; if not, it is to be copied now."""
        self._clear, self._last = True, step
        return Stamp(self.attempt, step) in self._stamps

    def begin(self, step: int) -> int | None:
        """A slot to copy the state after `step` completed steps into; None: skip it."""
        assert self._writing is None, self._writing
        number = None
        if self._clear:
            number = snapshots.free_slot(self._stamps, self.sealed, self.attempt)
        if number is not None:
            self._writing, self._stamps[number] = (number, step), None
            self._last = step
            self._put(*snapshots.slot_record(number, Slot(), self._next()))
        return number

    def finish(self, description: bytes, payload_bytes: int) -> None:
        """The copy is complete: sum it up, say so, and wake the carrier."""
        assert self._writing is not None
        number, step = self._writing
        start = self.shape.description_at(number)
        assert len(description) <= self.shape.description_max, len(description)
        self._put(start, description)
        digest = snapshots.digest(self._algorithm)
        digest.update(description)
        digest.update(self.payload(number)[:payload_bytes])
        at = Stamp(self.attempt, step)
        slot = Slot(
            at=at, description_bytes=len(description), payload_bytes=payload_bytes, algorithm=self._algorithm,
            checksum=digest.hexdigest(),
        )  # fmt: skip
        self._put(*snapshots.slot_record(number, slot, self._next()))
        self._writing, self._stamps[number] = None, at
        if not self._carrier.nudge():
            self._rejoin()

    def load(self, ranks: Sequence[int], world: int, at: Stamp) -> "list[State]":
        """Old ranks' states, from this rank's carrier. Errors: Unreachable, Refused."""
        return self.states(self._carrier, ranks, world, at)

    @staticmethod
    def states(carrier: Carrier, ranks: Sequence[int], world: int, at: Stamp) -> "list[State]":
        answer, files = carrier.ask(do="restore", ranks=list(ranks), world=world, at=list(at))
        found = []
        for descriptor, number in zip(files, answer["slots"], strict=True):
            found.append(_mapped(descriptor, int(number)))
            os.close(descriptor)
        return found

    def close(self) -> None:
        """Let go of the carrier; what is in the slots stays with it."""
        self._carrier.close()
        os.close(self._descriptor)

    def _rejoin(self) -> None:
        """Another carrier may be there by now: it gets the file. Not tried at each step, it may be stuck."""
        if time.monotonic() < self._again_s:
            return
        self._again_s = time.monotonic() + _AGAIN_S
        try:
            _, files = self._carrier.ask(
                [self._descriptor], do="join", attempt=self.attempt, within_s=_REJOIN_S
            )
        except KeepstepError as error:
            if not isinstance(error, Unreachable):
                _log.warning("rank %d has no carrier: %s", self.shape.rank, error)
            self._put(*snapshots.buddy_record(None, self._next()))  # nobody sends copies on
            return
        for descriptor in files:
            os.close(descriptor)
        self._again_s = 0.0
        self._carrier.nudge()

    def _put(self, start: int, data: bytes) -> None:
        self._memory[start : start + len(data)] = data

    def _next(self) -> int:
        self._generation += 1
        return self._generation


@dataclass(frozen=True, slots=True)
class State:
    """One rank's state, mapped from its memory file."""

    shape: Shape
    description: bytes
    payload: memoryview


def _mapped(descriptor: int, number: int) -> State:
    page = os.pread(descriptor, PAGE, 0)
    shape, slot = snapshots.read_shape(page), snapshots.read_slots(page)[number]
    assert shape is not None
    memory = memoryview(mmap.mmap(descriptor, shape.bytes))
    start, payload = shape.description_at(number), shape.payload_at(number)
    return State(
        shape,
        bytes(memory[start : start + slot.description_bytes]),
        memory[payload : payload + slot.payload_bytes],
    )
