"""What is looked for in the kernel's log. Data only; patterns are on bytes, for they are tried on floods.

A record of /dev/kmsg is `priority,sequence,microseconds since boot,flags;text`; lines that begin with a space
belong to the record before them.
"""

import re
from dataclasses import dataclass

from keepstep.core.health import FaultKind

RECORD = re.compile(rb"^\d+,(\d+),(\d+),[^;\n]*;(.*)$", re.MULTILINE)

XID = re.compile(rb"NVRM: Xid \(((?:PCI:)?[0-9a-fA-F:.]+)\).*?: (\d+)\b")
PID = re.compile(rb"\bpid='?(\d+)")
ACTION_XID = 154
ACTION = re.compile(rb"changed from \S+ .*?to 0x([0-9a-fA-F]+)")


@dataclass(frozen=True, slots=True)
class Pattern:
    """`where`: a group named `where` is the component, `pid` the process, `code` the number."""

    kind: FaultKind
    regex: re.Pattern[bytes]


# The first that matches counts.
PATTERNS = tuple(
    Pattern(kind, re.compile(regex))
    for kind, regex in (
        (FaultKind.SXID, rb"SXid \((?P<where>(?:PCI:)?[0-9a-fA-F:.]+)\).*?: (?P<code>\d+)\b"),
        (FaultKind.OOM_KILL, rb"Killed process (?P<pid>\d+)"),
        (FaultKind.BLOCKED_TASK, rb"task \S+:(?P<pid>\d+) blocked for more than \d+ seconds"),
        (FaultKind.FILE_SYSTEM, rb"EXT4-fs error \(device (?P<where>[\w-]+)\)"),
        (FaultKind.FILE_SYSTEM, rb"EXT4-fs \((?P<where>[\w-]+)\): Remounting filesystem read-only"),
        (
            FaultKind.FILE_SYSTEM,
            rb"XFS \((?P<where>[\w-]+)\): .*(?:[Ss]hutting down|[Cc]orruption|been shut)",
        ),
        (FaultKind.FILE_SYSTEM, rb"BTRFS.*\(device (?P<where>[\w-]+)[^)]*\).*(?:forced readonly|error)"),
        (FaultKind.NETWORK_FS, rb"nfs: server (?P<where>\S+) not responding"),
        (FaultKind.NETWORK_FS, rb"Lustre.*Connection to (?P<where>\S+) .*was lost"),
        (FaultKind.IO_ERROR, rb"I/O error,? (?:on )?dev(?:ice)? (?P<where>[\w-]+)"),
        (
            FaultKind.IO_ERROR,
            rb"nvme (?P<where>nvme\w+): (?:I/O .*timeout|Device not|controller is down)",
        ),
        (FaultKind.NIC, rb"mlx\w+ (?P<where>[0-9a-f:.]+):.*health (?:compromised|poll failed)"),
        (FaultKind.NIC, rb"NETDEV WATCHDOG: (?:CPU: \d+: )?(?P<where>[\w.-]+)"),
    )
)

# A record without any of these is none of them.
WORDS = (
    b"Xid (", b"Killed process", b"blocked for more", b"EXT4-fs", b"XFS", b"BTRFS", b"nfs: server", b"Lustre",
    b"I/O", b"nvme", b"health", b"NETDEV WATCHDOG",
)  # fmt: skip
