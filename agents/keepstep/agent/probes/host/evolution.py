"""From what was observed to what is not well. Pure."""

from collections import deque
from collections.abc import Iterator

from keepstep.agent.probes.host.source import Observed
from keepstep.agent.probes.host.thresholds import Thresholds
from keepstep.agent.probes.standing import check
from keepstep.core.health import Level
from keepstep.wire.health import Check


class Evolution:
    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._limits = thresholds or Thresholds()
        self._writable: set[str] = set()  # devices that were, since this agent was started
        self._blocked: deque[tuple[float, int]] = deque()

    def take(self, seen: Observed) -> tuple[Check, ...]:
        self._blocked.append((seen.at, seen.blocked))
        while len(self._blocked) > 1 and self._blocked[1][0] <= seen.at - self._limits.blocked_s:
            self._blocked.popleft()
        self._writable |= {mount.device for mount in seen.mounts if mount.writable}
        return tuple(self._checks(seen))

    def _checks(self, seen: Observed) -> Iterator[Check]:
        limits = self._limits
        left = seen.memory_available / max(1, seen.memory_total)
        if seen.memory_total and left < limits.memory_share:
            level = Level.BAD if left < limits.memory_share_bad else Level.WARN
            limit = seen.memory_total * limits.memory_share
            text = f"{seen.memory_available >> 20} of {seen.memory_total >> 20} MiB are left"
            yield check("host.memory", "", level, seen.memory_available, limit, text)
        for path, space in seen.space.items():
            if space.free < limits.disk_bytes and space.total > 4 * limits.disk_bytes:
                level = Level.BAD if space.free < limits.disk_bytes_bad else Level.WARN
                text = f"{space.free >> 20} MiB are left of {space.total >> 20}"
                yield check("host.disk_space", path, level, space.free, limits.disk_bytes, text)
        if seen.shm is not None and seen.shm.total and seen.shm.free < limits.shm_share * seen.shm.total:
            text = f"{seen.shm.free >> 20} of {seen.shm.total >> 20} MiB are left in /dev/shm"
            limit = limits.shm_share * seen.shm.total
            yield check("host.shm", "", Level.WARN, seen.shm.free, limit, text)
        for mount in seen.mounts:
            if not mount.writable and mount.device in self._writable:
                text = f"{mount.point} ({mount.kind} on {mount.device}) was writable and is read-only"
                yield check("host.read_only", mount.point, Level.BAD, 1, 0, text)
        load = seen.load_15 / max(1, seen.cpus)
        if load > limits.load_per_cpu:
            text = f"{seen.load_15:.0f} runnable tasks on {seen.cpus} processors, over fifteen minutes"
            yield check("host.load", "", Level.WARN, load, limits.load_per_cpu, text)
        share = seen.descriptors / max(1, seen.descriptors_max)
        if share > limits.file_descriptors:
            text = f"{seen.descriptors} of {seen.descriptors_max} are in use"
            yield check("host.file_descriptors", "", Level.BAD, share, limits.file_descriptors, text)
        yield from self._blocked_for_long(seen)

    def _blocked_for_long(self, seen: Observed) -> Iterator[Check]:
        limits = self._limits
        least = min(count for _, count in self._blocked)
        if least >= limits.blocked_tasks and seen.at - self._blocked[0][0] >= limits.blocked_s:
            text = f"{least} tasks and more are blocked in the kernel for {limits.blocked_s:.0f} s"
            yield check("host.blocked_tasks", "", Level.WARN, least, limits.blocked_tasks, text)
