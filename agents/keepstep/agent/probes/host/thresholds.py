"""From when on a host is said not to be well. Judgement."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    memory_share: float = 0.03  # left; less than this and the kernel is about to end something
    memory_share_bad: float = 0.01
    disk_bytes: int = 5 * GIB  # left, on file systems that are larger than four times this
    disk_bytes_bad: int = 1 * GIB
    shm_share: float = 0.05  # left: workers of data loaders fail without it
    load_per_cpu: float = 8.0  # over fifteen minutes
    file_descriptors: float = 0.9  # share
    blocked_tasks: int = 16  # in the kernel at every look of `blocked_s`
    blocked_s: float = 120.0
