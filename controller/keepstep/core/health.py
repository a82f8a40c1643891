"""The words of node health: what a probe may report, under one name everywhere.

A **check** is a level: how one component does now, only told while it is not well. A **fault** is a count:
something that happens and is over (an XID, a process that the kernel ended), told as "so often since boot,
last at", so that a flood is one line, a repeated report changes nothing, and an agent that restarts and reads
the kernel's log again counts the same. Names are `probe.check`; a component is a GPU's UUID, an interface, a
device or a path, and "" the node itself.
"""

from enum import StrEnum


class Level(StrEnum):
    """How a check stands. What is well is not reported."""

    WARN = "warn"  # past a threshold that tells of trouble to come
    BAD = "bad"  # work there fails, or is slowed, now


class ProbeState(StrEnum):
    """Whether a probe sees at all."""

    OK = "ok"
    DEGRADED = "degraded"  # sees a part: the reason says which is missing
    HUNG = "hung"  # a call does not come back
    ABSENT = "absent"  # there is nothing of the kind on this node


class FaultKind(StrEnum):
    XID = "xid"  # code: NVIDIA's number
    SXID = "sxid"  # of an NVSwitch
    OOM_KILL = "oom_kill"
    BLOCKED_TASK = "blocked_task"
    IO_ERROR = "io_error"
    FILE_SYSTEM = "file_system"  # remounted read-only, or an error of its own
    NETWORK_FS = "network_fs"  # a server of network storage does not answer
    NIC = "nic"  # "health compromised" and its like


# Check name -> what it means. The catalogue that triage's policy may name.
CHECKS = {
    "gpu.lost": "the driver cannot reach a GPU that it had",
    "gpu.missing": "fewer GPUs than this node had when it was healthy",
    "gpu.hung": "a driver call about it does not come back",
    "gpu.recovery_action": "the driver asks for an action: value is its number, unknown ones mean drain",
    "gpu.temperature": "hotter than its slowdown margin allows, in degrees Celsius",
    "gpu.memory_temperature": "its memory hotter than it may be, in degrees Celsius",
    "gpu.throttled": "clocks held down by heat, power or hardware: the text names the reason",
    "gpu.ecc_uncorrectable": "uncorrectable memory errors since the driver was loaded",
    "gpu.ecc_correctable": "correctable memory errors, per hour",
    "gpu.row_remap_pending": "a row remap waits for a reset",
    "gpu.row_remap_failed": "a row could not be remapped: the memory has no spare rows left",
    "gpu.nvlink_errors": "errors of its NVLinks, per minute",
    "gpu.nvlink_down": "NVLinks that should be up and are not",
    "gpu.pcie_width": "its link is narrower or slower than it can be: value is the lanes",
    "gpu.pcie_replays": "replays of its PCIe link, per minute",
    "gpu.fabric": "its fabric is not ready",
    "host.memory": "memory left, in bytes",
    "host.disk_space": "space left on a file system, in bytes",
    "host.read_only": "a file system that was writable is read-only",
    "host.file_system_hang": "a file system does not answer",
    "host.blocked_tasks": "tasks blocked in the kernel for long",
    "host.load": "runnable tasks per processor",
    "host.clock_skew": "seconds between its clock and the controller's",
    "host.file_descriptors": "share of the file descriptors in use",
    "host.shm": "space left in /dev/shm, in bytes",
    "network.link_down": "an interface that carries training traffic is down",
    "network.errors": "errors of an interface, per minute",
    "network.flaps": "a link that goes down and up, per hour",
    "network.infiniband": "errors of an InfiniBand port, per minute",
    "network.buddy_unreachable": "the buddy's carrier does not answer",
    "storage.slow": "a bounded write, fsync and read in the checkpoint folder took so many seconds",
    "storage.failed": "a write, fsync or read in the checkpoint folder failed",
}
