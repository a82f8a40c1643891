"""The messages between agents and the controller, as msgpack maps over one WebSocket.

State and events are different things. **State** says how things are now: the latest wins, nothing is queued,
and only state reaches the judge. **Events** are history: numbered, spooled to the agent's disk, sent until
acknowledged, bounded; a gap is an event of its own. Commands are levels too: `Desired` lists what the node
should run, and repeating it changes nothing.

Every struct is a tagged map, never positional; unknown fields are skipped by the decoder, so versions N-1, N
and N+1 understand each other. A new field needs a default. Times are ages in seconds from the sender's own
monotonic clock; no message carries a moment that the other side would have to compare with its own clock.
"""

from typing import Any, cast

import msgspec

from keepstep.wire.health import HealthStatus
from keepstep.wire.part import Part

PROTOCOL = 1
MAX_MESSAGE_BYTES = 4 << 20


class Message(msgspec.Struct, tag_field="t", kw_only=True, omit_defaults=True, frozen=True):
    """The root of everything that is sent on its own."""


# ---------------------------------------------------------------- agent -> controller


class RankStatus(Part, kw_only=True, frozen=True):
    rank: int
    local_rank: int
    state: str  # waiting | running | exited
    pid: int = 0
    exit_code: int | None = None
    signal: int | None = None
    exited_age_s: float | None = None
    exit_order: int = 0  # 1: the first of this node's ranks to end
    step: int = -1  # completed optimizer steps; -1: never seen to step
    step_age_s: float | None = None
    phase: str = ""
    phase_age_s: float | None = None
    micro_batch: int = 0
    counter: int = 0  # any beacon counter that moves is progress
    checkpoint_step: int = -1
    snapshot_step: int = -1
    stall_s: float = 0.0
    process: str = (
        ""  # running | stopped | traced | blocked (in the kernel) | zombie | gone; "": not looked at
    )
    process_s: float = 0.0  # it was seen like that at every look for so long; a late look begins anew
    still_s: float | None = None  # none of its counters moved for so long, by looks; None: not looked at
    waiting_s: float | None = None  # it has been waiting for others for so long; None: it does not wait
    wait_s: float = 0.0  # spent waiting for other ranks, in all
    group: str = ""  # the group that it waits in, or waited in last
    group_sequence: int = 0
    peer: int = -1  # the rank that it waits for
    launched: int = 0  # waits begun ...
    completed: int = 0  # ... and ended
    batches: int = 0  # from its data loader
    passed_s: float | None = None  # in all phases that it completed; of these ...
    own_s: float = 0.0  # ... computing, waiting for others left out
    data_s: float = 0.0  # ... and for data
    collected_s: float = 0.0  # Python collected garbage, in all
    starved_s: float = 0.0  # its main thread was ready to run and had no processor, in all
    trouble: str = ""  # core.beacon.Trouble: numbers of it that cannot be true
    trouble_step: int = -1
    error: str = ""  # the error file's message, else the last line of the log; only after a failure
    last_lines: tuple[str, ...] = ()
    gpu: str = ""  # UUID of the GPU that it computes on; "": none, or not known


class PhaseSeen(Part, kw_only=True, frozen=True):
    """How long one phase took, over all ranks of a node: `core.beacon.Seen`, added up."""

    phase: str
    count: int
    ranks: int = 1  # that completed it
    total_s: float = 0.0
    waited_s: float = 0.0
    longest_s: float = 0.0
    bins: tuple[int, ...] = ()


class AttemptStatus(Part, kw_only=True, frozen=True):
    """One attempt as its node sees it."""

    job: str
    attempt: int
    phase: str  # preparing | prepared | running | ending | dead | refused
    reason: str = ""  # why it is refused, or what it is waiting for
    incarnation: int = 1
    master: tuple[str, int] | None = None  # where the rendezvous store listens, from node rank 0
    warm: bool = False  # ranks are forked from a standby server
    cold_reason: str = ""
    alive: int = 0  # descendants of the attempt that still live, ranks included
    unfenced_s: float | None = None  # no controller and no step for this long
    ranks: tuple[RankStatus, ...] = ()
    phases: tuple[PhaseSeen, ...] = ()
    bubble_s: float = 0.0  # of what they waited, for neighbours in a pipeline
    losses: tuple[tuple[int, float], ...] = ()  # of the last steps, where this node knows them


class StandbyStatus(Part, kw_only=True, frozen=True):
    job: str
    state: str  # loading | ready | broken
    memory_bytes: int = 0


class Held(Part, kw_only=True, frozen=True):
    """One rank's whole state in memory. The same rank of another world size is another part of the model."""

    rank: int
    world: int
    attempt: int
    step: int
    own: bool = True  # False: a copy, kept for the node that the rank runs on


class SnapshotStatus(Part, kw_only=True, frozen=True):
    """What a node holds in memory of one job's states, and where its carrier listens."""

    job: str
    address: tuple[str, int]
    memory_bytes: int = 0
    held: tuple[Held, ...] = ()
    after: int = 0  # it was looked at when this attempt was known to be dead; see `Keep.over`


class NodeStatus(Part, kw_only=True, frozen=True):
    load: float = 0.0
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    agent_memory_bytes: int = 0


class Register(Message, tag="register", kw_only=True, frozen=True):
    """First message of a connection: who this is and how things are now."""

    protocol: int
    version: str
    node: str
    role: str = "run"  # run | watch | run+watch
    pool: str = ""
    instance: str  # of this agent process; a newer one of the same node and role replaces it
    boot_id: str
    hostname: str = ""
    pid: int = 0
    address: str = ""  # where its ranks can be reached by other nodes
    interface: str = ""
    slots: int = 0
    gpus: tuple[str, ...] = ()  # UUIDs; empty: the slots are processes on the CPU
    labels: dict[str, str] = {}
    capabilities: tuple[str, ...] = ()
    first_event: int = 0  # the oldest event still in the spool
    state: "State | None" = None


class State(Message, tag="state", kw_only=True, frozen=True):
    sequence: int
    node: NodeStatus = NodeStatus()
    attempts: tuple[AttemptStatus, ...] = ()
    standbys: tuple[StandbyStatus, ...] = ()
    snapshots: tuple[SnapshotStatus, ...] = ()
    health: HealthStatus | None = None  # None: this agent has no probes
    leaving: bool = False


class Event(Part, kw_only=True, frozen=True):
    number: int
    kind: str
    age_s: float = 0.0  # at sending
    same_boot: bool = True  # else the age means nothing
    job: str = ""
    attempt: int = 0
    data: dict[str, Any] = {}


class Events(Message, tag="events", kw_only=True, frozen=True):
    events: tuple[Event, ...]


class Answer(Message, tag="answer", kw_only=True, frozen=True):
    id: int
    data: Any = None
    error: str = ""


# ---------------------------------------------------------------- controller -> agent


class Welcome(Message, tag="welcome", kw_only=True, frozen=True):
    protocol: int
    version: str
    term: int
    state_every_s: float = 1.0
    lease_s: float = 30.0  # without an acknowledgement for this long the agent knows it is alone
    acknowledged_event: int = 0


class Refusal(Message, tag="refusal", kw_only=True, frozen=True):
    """The connection ends after this; `retry_after_s` None: do not come back with these credentials."""

    what: str
    why: str = ""
    next: str = ""
    retry_after_s: float | None = None


class Acknowledge(Message, tag="ack", kw_only=True, frozen=True):
    sequence: int
    event: int = 0


class Memory(Part, kw_only=True, frozen=True):
    """The state that `Launch.restore` names is in memory, taken in this layout."""

    layout: dict[str, int]
    holders: tuple[tuple[str, ...], ...]  # nodes by old rank, the best one first


class Launch(Part, kw_only=True, frozen=True):
    """One attempt's part on this node. Identified by (job, attempt); started at most once, ever."""

    job: str
    attempt: int
    incarnation: int = 1
    name: str = ""
    project: str = ""
    world_size: int
    nodes: tuple[str, ...]  # by node rank
    node_rank: int
    ranks: tuple[int, ...]
    go: bool = False  # every node is prepared: start the ranks
    master: tuple[str, int] | None = None
    run: dict[str, Any]  # the spec's `run`, normalised: how ranks are made
    layout: dict[str, int]
    replicas: int  # data-parallel replicas asked for; layout.dp may be smaller after a shrink
    checkpoint: dict[str, Any] = {}
    restore: tuple[int, int] | None = None  # (attempt, step) on this attempt's chain
    memory: Memory | None = None  # None: what is to be restored is in storage
    secret: str = ""  # of this job's carriers; "": no snapshots in memory
    carriers: dict[str, tuple[str, int]] = {}  # where those of the job listen, by node
    buddy: str = ""  # the node that keeps copies of this node's snapshots; "": none
    lineage: tuple[tuple[int, int, int], ...] = ()  # (attempt, parent attempt, parent step)
    skip_steps: tuple[int, ...] = ()  # whose batch is left out
    self_fence_s: float | None = 30.0  # None: its writes are fenced, no need to end it when alone
    orphan_lease_s: float = 3600.0
    attached: bool = False


class Stop(Part, kw_only=True, frozen=True):
    """End an attempt's ranks on this node, and confirm that nothing of it is left."""

    job: str
    attempt: int
    reason: str = ""
    grace_s: float = 0.0  # 0: kill; else first the spec's stop signal
    finish_s: float = 0.0  # before a kill: for ranks that have a regular file open for writing


class Warm(Part, kw_only=True, frozen=True):
    """Keep a standby server for a job that this node may have to take over."""

    job: str
    run: dict[str, Any]


class Keep(Part, kw_only=True, frozen=True):
    """Keep a carrier for a job that has no rank here: this node keeps copies, or what others still restore.

    Fields as those of `Launch`.
    """

    job: str
    attempt: int
    world_size: int
    layout: dict[str, int]
    ranks: tuple[int, ...] = ()
    restore: tuple[int, int] | None = None
    memory: Memory | None = None
    lineage: tuple[tuple[int, int, int], ...] = ()
    secret: str
    carriers: dict[str, tuple[str, int]] = {}
    buddy: str = ""
    over: bool = False  # the attempt is dead: say what is held now


class Desired(Message, tag="desired", kw_only=True, frozen=True):
    """What this node should run. What it runs beyond that goes on until a stop names it."""

    term: int
    instance: str
    launches: tuple[Launch, ...] = ()
    stops: tuple[Stop, ...] = ()
    warm: tuple[Warm, ...] = ()
    keep: tuple[Keep, ...] = ()
    forget: tuple[tuple[str, int], ...] = ()  # dead attempts whose end is recorded: reports may stop


class Query(Message, tag="query", kw_only=True, frozen=True):
    """Asks for something that is too large or too rare for the state."""

    id: int
    kind: str  # logs | inventory | evidence | save
    term: int
    params: dict[str, Any] = {}


FromAgent = Register | State | Events | Answer
FromController = Welcome | Refusal | Acknowledge | Desired | Query

_FROM_AGENT_TAGS = frozenset({"register", "state", "events", "answer"})
_FROM_CONTROLLER_TAGS = frozenset({"welcome", "refusal", "ack", "desired", "query"})

_encoder = msgspec.msgpack.Encoder()
_from_agent = msgspec.msgpack.Decoder(FromAgent)
_from_controller = msgspec.msgpack.Decoder(FromController)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode_from_agent(data: bytes) -> FromAgent | None:
    """A message, or None for one of a kind that only a newer version knows.

    Errors: msgspec.DecodeError where the bytes are no message at all.
    """
    return cast("FromAgent | None", _decode(_from_agent, data, _FROM_AGENT_TAGS))


def decode_from_controller(data: bytes) -> FromController | None:
    return cast("FromController | None", _decode(_from_controller, data, _FROM_CONTROLLER_TAGS))


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes, known: frozenset[str]) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError:
        tag = msgspec.msgpack.decode(data, type=dict[str, Any]).get("t")
        if isinstance(tag, str) and tag not in known:
            return None
        raise
