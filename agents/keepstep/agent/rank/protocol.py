"""What agent and shim tell each other: launch.json, statuses, the result.

Plain frozen dataclasses; JSON on the wire. The agent writes and reads them with msgspec, the shim with what
the standard library has. Times are nanoseconds of this machine's CLOCK_MONOTONIC.
"""

import json
import os
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BEACON_PAGE = 4096  # keepstep.core.beacon.PAGE; a test holds them equal
MARKER = "KEEPSTEP_ATTEMPT"
MARKER_ROOM = 160  # bytes that a standby server keeps free for the marker in its initial environment

LAUNCH, SOCKET, IDENTITY, RESULT, LOG = "launch.json", "shim.sock", "shim.json", "result.json", "shim.log"


@dataclass(frozen=True, kw_only=True)
class RankLaunch:
    rank: int
    local_rank: int
    slot: int
    env: dict[str, str] = field(default_factory=dict)  # over the launch's env


@dataclass(frozen=True, kw_only=True)
class Rotate:
    bytes: int = 64 << 20  # of one file
    files: int = 3  # of one rank, the present one included


@dataclass(frozen=True, kw_only=True)
class Stop:
    signal: str = "TERM"
    grace_s: float = 30.0  # time to write a last checkpoint


@dataclass(frozen=True, kw_only=True)
class LaunchFile:
    """One attempt on one node, all that its shim needs to know."""

    job: str
    attempt: int
    node: str
    world_size: int
    nodes: int
    node_rank: int
    ranks: tuple[RankLaunch, ...]
    argv: tuple[str, ...]
    python: bool  # argv is a script or -m module for the interpreter; else a native command
    interpreter: tuple[str, ...]  # executable and flags; empty: none, and so no rendezvous store
    cwd: str
    env: dict[str, str]  # the whole environment: nothing is inherited
    umask: int | None = None
    limits: dict[str, int] = field(default_factory=dict)  # soft limits by resource name, -1: the hard one
    rotate: Rotate = Rotate()
    store: bool = False  # host the rendezvous store
    bind_address: str = "127.0.0.1"
    stop: Stop = Stop()
    warm: bool = False
    early: dict[str, str | None] = field(default_factory=dict)  # set by the script before its imports
    cgroup: str = ""  # a delegated cgroup v2 folder

    @property
    def marker(self) -> str:
        return f"{self.job}/{self.attempt}/{self.node}"

    @classmethod
    def read(cls, path: Path) -> "LaunchFile":
        raw: dict[str, Any] = json.loads(path.read_bytes())
        raw.pop("marker", None)
        return cls(
            **{
                **raw,
                "ranks": tuple(RankLaunch(**rank) for rank in raw["ranks"]),
                "argv": tuple(raw["argv"]),
                "interpreter": tuple(raw["interpreter"]),
                "rotate": Rotate(**raw.get("rotate", {})),
                "stop": Stop(**raw.get("stop", {})),
            }
        )


@dataclass(frozen=True, kw_only=True)
class RankState:
    rank: int
    local_rank: int
    pid: int | None = None
    state: str = "waiting"  # waiting | running | exited | lost (the shim was killed before it could tell)
    exit_code: int | None = None  # exactly one of exit_code and signal is set once exited
    signal: str | None = None  # "SIGKILL"
    exited_ns: int | None = None
    order: int | None = None  # 1: the first exit on this node


@dataclass(frozen=True, kw_only=True)
class ShimStatus:
    phase: str  # preparing | prepared | running | ending | dead
    master_port: int | None = None
    store: bool = False  # a store listens there; False: rank 0 is to bind it
    alive: int = 0  # living descendants, without the store
    warm: bool = False  # ranks are forked from a loaded process
    note: str = ""  # why not warm, why no store, what could not be killed
    ranks: tuple[RankState, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_atomically(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all, also after a power cut. Of two writers at once, one wins whole."""
    draft = path.with_name(f"{path.name}.new.{threading.get_native_id()}")
    with draft.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
