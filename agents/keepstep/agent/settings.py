"""What an agent is told when it is started. Seconds, unless a name says otherwise."""

import platform
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """How much of dead attempts is kept for people who come later: their logs, above all."""

    attempts: int = 5  # of one job
    jobs: int = 50
    bytes: int = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    node: str = field(default_factory=platform.node)  # the name the controller knows this machine by
    dir: Path  # this agent's own state; survives it, and is what makes "at most once" true
    controllers: tuple[str, ...] = ()  # http(s) URLs, tried in turn
    endpoint_file: Path | None = (
        None  # JSON with url and token, read anew at each connection (controller.json)
    )
    token: str | None = field(default=None, repr=False)  # of a join; a stored credential wins over it
    token_file: Path | None = None
    pool: str = "static"
    role: str = "run"  # run | watch | run+watch
    slots: int | None = None  # ranks at once; None: one for each GPU, else for each CPU
    gpus: tuple[str, ...] | None = (
        None  # UUIDs or indexes as CUDA_VISIBLE_DEVICES takes them; None: found out
    )
    labels: dict[str, str] = field(default_factory=dict)
    address: str | None = (
        None  # where ranks of other nodes reach this one's; None: the route to the controller
    )
    interface: str | None = None
    attached: bool = False  # belongs to a terminal: when it goes, its ranks go
    leash: bool = False  # belongs to who holds the other end of its standard input: closed, its ranks go
    drain: bool = False  # end the ranks before leaving (otherwise they go on: an upgrade)
    exit_when_orphaned_s: float | None = (
        None  # a local agent with nothing to do does not outlive its controller
    )
    leave_within_s: float = 5.0  # for the last report to be acknowledged, once nothing is left to end
    reconnect_first_s: float = 0.2  # the controller on this machine may be back in a moment
    reconnect_max_s: float = 15.0  # full jitter up to here: 16,384 agents must not come back in step
    prepare_within_s: float = (
        600.0  # bundle, code and standby server; the controller has its own, shorter bound
    )
    standby_bytes_max: int | None = None  # of all standby servers; over it ranks start cold. None: no limit
    standby_processes: bool | None = None  # started ahead for each rank, not forked; None: on GPUs
    standby_context: bool = False  # each of them creates its CUDA context: some hundred MB of its GPU
    standby_linger_s: float = 300.0  # for the next job like the last one: scripts are edited and run again
    spool_bytes: int = 16 << 20  # of unacknowledged events; the oldest go first, and the gap is told
    snapshot_bytes: int | None = None  # of one rank's slots in memory, at most; None: half of what is free
    history: History = History()
    probes: bool = True  # look after the node's health
    kernel_log: Path | None = Path("/dev/kmsg")  # or a file or FIFO in its format; None: not read
    driver_call_s: float = 3.0  # a call of the GPUs' driver that takes longer hangs: its GPU is left out
    driver_trial_s: float = 60.0  # until such a GPU is tried again; twice as long each time
    metrics: tuple[str, int] | None = None  # address and port of /metrics; None: none

    @property
    def runs_ranks(self) -> bool:
        return self.role != "watch"
