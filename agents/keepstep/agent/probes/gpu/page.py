"""One page of memory in which the sampling process says which driver call it is in, without a system call.

Two places, one for each of its threads: the pass, and the wait for events. A place is (number of the call
since the start, index of the GPU, call, when it was entered); the agent asks only whether it is the same call
as a while ago, so a torn read is corrected by the next one.
"""

import mmap
import os
import struct

from keepstep.agent.probes.gpu.catalogue import CALLS, NUMBERS

SIZE = 4096
PASS, EVENTS = 0, 64
NO_GPU = 0xFFFF
_PLACE = struct.Struct("<QHHId")  # count, GPU, call, unused, since


class Page:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, SIZE)
        self._counts = {PASS: 0, EVENTS: 0}

    @classmethod
    def made(cls) -> "Page":
        descriptor = os.memfd_create("keepstep-probe", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, SIZE)
        return cls(descriptor)

    def enter(self, place: int, gpu: int, call: str, now: float) -> None:
        self._counts[place] += 1
        _PLACE.pack_into(self._memory, place, self._counts[place], gpu, NUMBERS[call], 0, now)

    def leave(self, place: int) -> None:
        self._counts[place] += 1
        _PLACE.pack_into(self._memory, place, self._counts[place], NO_GPU, 0, 0, 0.0)

    def look(self, place: int) -> tuple[int, int, str, float]:
        """(count, GPU's index, call, entered at). "": between calls."""
        count, gpu, call, _, since = _PLACE.unpack_from(self._memory, place)
        return count, gpu, CALLS[call] if call < len(CALLS) else "", since

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)
