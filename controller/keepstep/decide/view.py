"""What decisions are taken from: one frozen picture of jobs and nodes.

Ages are seconds by the controller's own monotonic clock and by the rule for late observers: an observer whose
own tick came late has counted one period of silence, no more. Nothing in a view is a moment in time, so a
view means the same when it is replayed from the store years later.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from keepstep.core.durations import Usual
from keepstep.core.ids import Attempt, JobId, Node, Rank, Step
from keepstep.core.job import JobSpec
from keepstep.core.layout import Layout
from keepstep.core.states import AttemptState, JobState, LifeState, NodeState

NOTHING = Attempt(0)  # the parent of an attempt that begins from nothing
BEGINNING = Step(0)
RESERVED_FOR = "keepstep.job"  # a label of nodes that were asked for one job, and serve no other


class Wanted(StrEnum):
    """What its owner wants of a job."""

    RUN = "run"
    SUSPEND = "suspend"
    CANCEL = "cancel"


class PartPhase(StrEnum):
    """Where one node's part of an attempt is, as its agent reports it."""

    UNKNOWN = "unknown"  # no agent has reported it (yet)
    PREPARING = "preparing"
    PREPARED = "prepared"
    RUNNING = "running"
    ENDING = "ending"
    DEAD = "dead"  # no descendant is left
    REFUSED = "refused"  # the node cannot run it; the reason says why


class RankPhase(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    EXITED = "exited"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    name: Node
    pool: str
    slots: int
    state: NodeState = NodeState.READY
    connected: bool = True
    silence_s: float = 0.0  # since its last word; 0 while it talks
    confirmed: str = ""  # positive evidence that the node or its agent's processes are dead, or ""
    reset: bool = False  # its connection was reset or closed, rather than gone quiet
    leaving: bool = False  # its agent is about to leave, and nothing of any attempt is alive on it
    left: bool = False  # its agent took its leave, and nothing of any attempt was alive on it
    life: LifeState = LifeState.HEALTHY  # as hardware; only some of them get new work
    life_why: str = ""
    life_by: str = ""  # who took it out: keepstep, its pool, or a person
    drain_s: float | None = None  # left until a draining node's deadline
    attached: JobId | None = None  # serves this job only (`keepstep run`)
    warm_for: frozenset[JobId] = frozenset()  # has a loaded standby server for these
    ready_s: float = 0.0  # since it became ready, without a break
    lingering: frozenset[JobId] = frozenset()  # something of an ended attempt of these still lives on it
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds a step of one rank over the last while."""

    step_s: float
    own_s: float  # computing, waiting for others left out
    data_s: float
    waited_s: float  # for other ranks
    starved_s: float  # ready to run, and no processor for it
    collected_s: float = 0.0  # Python collected garbage; within the others
    waited_least_s: float | None = None  # in the quickest such while of the attempt so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What its driver says of the GPU that a rank computes on. None: it does not say."""

    index: int
    throttled: tuple[str, ...] = ()  # thermal | power | hardware | other
    clock_mhz: int | None = None
    lanes: int | None = None  # of its PCIe link ...
    generation: int | None = None  # ... and their speed


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    rank: Rank
    phase: RankPhase = RankPhase.UNKNOWN
    exit_code: int | None = None
    signal: int | None = None
    exited_age_s: float | None = None
    exit_order: int = 0  # among the ranks of its node, 1: first
    step: int = -1  # completed steps; -1: never seen to step
    doing: str = ""  # the beacon's phase
    doing_age_s: float | None = None
    error: str = ""
    local_rank: int = 0
    process: str = ""  # running | stopped | traced | blocked | zombie | gone; "": nobody looked
    process_s: float = 0.0  # for how long its agent's looks have found it so
    still_s: float | None = None  # none of its counters moved for so long, when it was last reported
    micro_batch: int = 0
    counter: int = 0
    waiting_s: float | None = None  # it waits for others since then
    group: str = ""  # in which it waits, or waited last; with the number of the collective in it
    group_sequence: int = 0
    peer: int = -1  # that it waits for
    launched: int = 0  # waits begun, and ended
    completed: int = 0
    batches: int = 0
    wait_s: float = 0.0  # in all
    trouble: str = ""  # numbers of it that cannot be true: core.beacon.Trouble
    trouble_step: int = -1
    pace: Pace | None = None  # None: too few steps yet
    gpu: Gpu | None = None  # None: it has none, or nothing is known of it

    @property
    def failed(self) -> bool:
        return self.phase is RankPhase.EXITED and self.exit_code != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One process group in a rank's flight recorder."""

    name: str
    ranks: tuple[Rank, ...]
    enqueued: int  # the last collective that this rank began, and the last that was completed
    completed: int
    op: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """A rank's TCP connections to one other host, as the kernel measures them."""

    local: str  # addresses
    peer: str
    rtt_s: float = 0.0  # the slowest round trip of those that are in use
    rtt_least_s: float = 0.0  # that was seen lately
    unanswered_s: float = 0.0  # what was sent is sent again and again, and nothing came back for so long
    resent: float = 0.0  # share of what was sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What an agent found when it looked at one rank closely."""

    rank: Rank
    process: str = ""  # as RankView.process
    kernel: str = ""  # where in the kernel it waits
    interpreter: str = ""  # answers | stuck (its lock is held) | unknown
    stack: tuple[str, ...] = ()  # innermost first, "file:line function"
    groups: tuple[Recorded, ...] = ()
    links: tuple[Connected, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """One close look at all ranks of an attempt."""

    attempt: Attempt
    age_s: float
    stacks: bool = True  # False: only at their processes and connections
    findings: tuple[Finding, ...] = ()
    errors: tuple[str, ...] = ()  # of nodes that did not answer


@dataclass(frozen=True, slots=True, kw_only=True)
class PartView:
    """One node's part of an attempt. `phase` is what was last heard; `heard` says if it is still current."""

    node: Node
    phase: PartPhase = PartPhase.UNKNOWN
    heard: bool = False  # reported over the node's present connection
    reason: str = ""
    alive: int = 0
    master: tuple[str, int] | None = None
    ranks: tuple[RankView, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One attempt's place in the lineage: it began from its parent's state after `parent_step` steps."""

    attempt: Attempt
    parent: Attempt = NOTHING
    parent_step: Step = BEGINNING
    good_until: Step | None = None  # its later states are wrong; None: nothing is known against it


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptView:
    number: Attempt
    state: AttemptState
    layout: Layout
    parts: tuple[PartView, ...]  # by node rank
    spares: tuple[Node, ...] = ()
    age_s: float = 0.0  # in its present state
    step: int = -1  # completed steps of the gang (the least over ranks that step), over all it was seen to do
    step_age_s: float = 0.0  # since any rank's step advanced; since `go` before the first one
    stepped: bool = False  # in this attempt
    master: tuple[str, int] | None = None
    went: bool = True  # it was told to go; False: no rank of it was ever started
    still_s: float = 0.0  # since the newest death of a part was heard or confirmed
    progress_age_s: float | None = None  # since any counter of a reachable rank moved; None: nobody counts
    step_every_s: float = 0.0  # how long a step usually takes (the longest of the last few); 0: not known yet
    checkpoint_step: int = -1  # the newest complete checkpoint it reported
    snapshot_step: int = -1  # the newest state that all its ranks have in memory

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(part.node for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An earlier failure, for budgets and back-off."""

    age_s: float
    blame: str  # "job" | "infrastructure"
    attempt: Attempt
    step: int
    signature: str = ""  # rank-independent: exit code or signal and first error line
    node: Node | None = None  # where it began, when that is known
    exit_code: int | None = None  # the culprit's, for the job's own
    error: str = ""  # its first error line
    rank: Rank | None = None  # the culprit
    not_after: int | None = None  # states of its attempt past this step are not to be trusted


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A complete checkpoint in the job's folder."""

    attempt: Attempt
    step: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One rank's whole state in the memory of a node that answers."""

    rank: Rank
    world: int  # size of the gang that it was a rank of
    attempt: Attempt
    step: Step
    node: Node
    own: bool = True  # the rank ran there; False: a buddy's copy
    fresh: bool = True  # looked at after the last attempt was dead; else newer ones may have replaced it


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A state in memory that is being stored, or was, or could not be."""

    at: Stored
    age_s: float = 0.0
    done: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What a node found in the checkpoint folder, after `after_attempt` was dead."""

    after_attempt: Attempt
    node: Node
    stored: tuple[Stored, ...]
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question that is under way."""

    kind: str  # "inventory"
    node: Node
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The last attempt that ended: where it ran, and how one knew that it was dead."""

    number: Attempt
    nodes: tuple[Node, ...]
    spares: tuple[Node, ...] = ()
    layout: Layout
    how: str = "confirmed"  # as `Dead` said it


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What this job's own attempts took, medians."""

    starts: Mapping[str, float] = field(default_factory=dict)  # by rung: from the decision to the first step


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    id: JobId
    spec: JobSpec
    state: JobState
    wanted: Wanted = Wanted.RUN
    reason: str = ""  # as it was last written down: an unchanged reason is not written again
    number: int = 0  # order of submission
    attempt: AttemptView | None = None  # the present one, until it has ended
    attempts: int = 0  # numbers used so far
    lineage: tuple[Link, ...] = ()  # of all attempts, oldest first
    steps_done: int = -1  # the newest step that any attempt completed
    failures: tuple[Failure, ...] = ()
    wait_s: float = 0.0  # back-off that is left
    queued_s: float = 0.0
    inventory: Inventory | None = None
    asked: tuple[Asked, ...] = ()
    attached: Node | None = None
    incident: int | None = None  # the open one
    kept: tuple[Kept, ...] = ()  # in memory; told when the last attempt is ending, or has ended
    saving: Saving | None = None  # the last one that was asked for since the last attempt began
    checkpoint_step: int = -1  # the newest complete one that the last attempt is known to have written
    ended: Ended | None = None  # None before the first attempt has ended
    usual: Mapping[str, Usual] = field(default_factory=dict)  # by phase: how long it took, over all attempts
    examined: tuple[Examined, ...] = ()  # of the present attempt, oldest first; the last two at most
    examining: bool = False  # a close look is under way
    measured: Measured = Measured()
    found: Mapping[str, float] = field(default_factory=dict)  # what was told of the attempt; seconds ago
    lacks: str = ""  # what its pool says of nodes that are not there yet
    losses: tuple[tuple[int, float], ...] = ()  # of the last steps, with their numbers, oldest first

    @property
    def held(self) -> tuple[Kept, ...]:
        """What is in memory for certain."""
        return tuple(one for one in self.kept if one.fresh)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    jobs: tuple[JobView, ...] = ()  # unfinished ones
    nodes: tuple[NodeView, ...] = ()
    up_s: float = 0.0  # since this controller took its term: agents need a moment to come back

    def node(self, name: Node) -> NodeView | None:
        return next((node for node in self.nodes if node.name == name), None)
