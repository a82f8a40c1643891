"""Which of the node's slots (GPUs, or places on the CPU) belong to which attempt."""

from collections.abc import Sequence

from keepstep.core.errors import InputError

Key = tuple[str, int]  # job, attempt


class Slots:
    def __init__(self, count: int, gpus: Sequence[str]) -> None:
        self.count, self._gpus = count, tuple(gpus)
        self._taken: dict[Key, tuple[int, ...]] = {}

    def take(self, key: Key, wanted: int) -> tuple[int, ...]:
        """The lowest free ones. On CPUs they are only numbers, and shared when there are too few.

        Errors: InputError when GPUs are wanted that others hold.
        """
        busy = {slot for slots in self._taken.values() for slot in slots}
        free = [slot for slot in range(self.count) if slot not in busy]
        if len(free) < wanted:
            if self._gpus:
                holders = ", ".join(f"{job}/{attempt}" for job, attempt in self._taken)
                raise InputError(
                    f"{wanted} GPUs are wanted and {len(free)} of {self.count} are free",
                    why=f"the others belong to {holders}" if holders else "",
                )
            free = [k % max(1, self.count) for k in range(wanted)]
        self._taken[key] = tuple(free[:wanted])
        return self._taken[key]

    def keep(self, key: Key, slots: tuple[int, ...]) -> None:
        """As an earlier agent gave them out."""
        self._taken[key] = slots

    def release(self, key: Key) -> None:
        self._taken.pop(key, None)

    def gpus(self, slots: Sequence[int]) -> tuple[str, ...]:
        return tuple(self._gpus[slot] for slot in slots) if self._gpus else ()
