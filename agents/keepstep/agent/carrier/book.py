"""What a carrier holds of a job: the files of this node's ranks, and copies for other nodes' ranks.

Files are known by (world size, rank): the same rank number means another part of the model in another layout.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from keepstep.agent.carrier.memory import Memory
from keepstep.core import snapshots
from keepstep.core.errors import NotFound, Refused
from keepstep.core.snapshots import Parents, Shape, Stamp

Key = tuple[int, int]  # world size, rank


@dataclass
class Book:
    bytes_max: int | None = None  # of one rank's slots
    own: dict[Key, Memory] = field(default_factory=dict)
    copies: dict[Key, Memory] = field(default_factory=dict)
    attempt: int = 0  # the newest one that was prepared here: older ones write no more
    parents: Parents = field(default_factory=dict)

    def made(self, where: dict[Key, Memory], shape: Shape) -> Memory:
        """The file of a rank, made anew where there is none of this shape. Errors: Refused."""
        key = shape.world, shape.rank
        memory = where.get(key)
        if memory is not None and memory.shape == shape:
            return memory
        if where is self.own:
            shape = replace(shape, slots=snapshots.SLOTS)
        fresh = Memory.make(shape, self.bytes_max)
        self._put(where, key, fresh)
        return fresh

    def adopt(self, memory: Memory) -> None:
        """A file that a rank kept while there was no carrier."""
        self._put(self.own, (memory.shape.world, memory.shape.rank), memory)

    def candidates(self, key: Key, at: Stamp) -> Iterator[tuple[Memory, int]]:
        """Slots that say that they hold a state, under whatever stamp. Own ones first."""
        for where in (self.own, self.copies):
            memory = where.get(key)
            for number, stamp in enumerate(memory.stamps if memory else ()):
                if stamp is not None and snapshots.origin(stamp, self.parents) == at:
                    assert memory is not None
                    yield memory, number

    def find(self, key: Key, at: Stamp) -> tuple[Memory, int] | None:
        """One that still is what it was."""
        return next((found for found in self.candidates(key, at) if found[0].whole(found[1])), None)

    def promote(self, key: Key) -> None:
        """A copy of a rank that runs here from now on."""
        if key in self.copies:
            self._put(self.own, key, self.copies.pop(key))

    def restored(self, world: int) -> None:
        """The present attempt has begun from what is here, in the layout of `world` ranks."""
        for where in (self.own, self.copies):
            for key, memory in list(where.items()):
                if key[0] != world:
                    where.pop(key).close()
                    continue
                stamps = memory.stamps
                memory.stamp(snapshots.after_restore(stamps, self.attempt, self.parents, memory.sealed))

    def clear(self) -> None:
        """The present attempt has begun from elsewhere: what is here is past, or left behind."""
        for memory in (*self.own.values(), *self.copies.values()):
            if self.attempt not in {at.attempt for at in memory.stamps if at}:
                memory.stamp([None] * len(memory.stamps))

    def leave_other_layouts(self, world: int) -> None:
        """The gang has sealed a state in its present layout: those of another one are not needed any more."""
        for where in (self.own, self.copies):
            for key in [key for key in where if key[0] != world]:
                where.pop(key).close()

    def keep_own(self, ranks: Iterable[int], world: int) -> None:
        """Ranks that run elsewhere from now on: what is here of them is a copy."""
        here = set(ranks)
        for key in [key for key in self.own if key[0] == world and key[1] not in here]:
            self._put(self.copies, key, self.own.pop(key))

    @property
    def memory_bytes(self) -> int:
        return sum(memory.shape.bytes for memory in (*self.own.values(), *self.copies.values()))

    def listed(self) -> list[list[Any]]:
        """[rank, world size, attempt, step, own] of every whole state."""
        return [
            [rank, world, at.attempt, at.step, own]
            for own, where in ((True, self.own), (False, self.copies))
            for (world, rank), memory in sorted(where.items())
            for at in memory.stamps
            if at is not None
        ]

    def slot_for(self, memory: Memory, at: Stamp, sealed: Stamp | None) -> int | None:
        """Where a copy may be written; None: it is here already.

        Errors: Refused for an attempt that was replaced, and while nothing is free.
        """
        if at.attempt < self.attempt:
            raise Refused(f"attempt {at.attempt} was replaced by attempt {self.attempt}")
        if at in memory.stamps:
            return None
        number = snapshots.free_slot(memory.stamps, sealed)
        if number is None:
            raise Refused("no slot is free before a newer state is sealed")
        return number

    def states(self, ranks: Sequence[int], world: int, at: Stamp) -> Iterator[tuple[Memory, int]]:
        """For ranks that restore. Errors: NotFound."""
        for rank in ranks:
            found = self.find((world, rank), at)
            if found is None:
                raise NotFound(f"step {at.step} of attempt {at.attempt} of rank {rank} is not here")
            yield found

    @staticmethod
    def _put(where: dict[Key, Memory], key: Key, memory: Memory) -> None:
        before = where.get(key)
        where[key] = memory
        if before is not None:
            before.close()
