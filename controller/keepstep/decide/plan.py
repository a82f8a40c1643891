"""What a decision comes to: changes of the desired state, each with its reason and what was rejected.

A plan is never replayed onto a changed world: the store takes it together with the desired state, and
applying means reconciling agents towards that state as often as needed.
"""

from dataclasses import dataclass

from keepstep.core.ids import Attempt, JobId, Node, Rank, Step
from keepstep.core.layout import Layout
from keepstep.core.states import NodeEvent
from keepstep.decide.view import Link, Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    option: str
    why: str
    lost_slot_s: float | None = None  # what it would have cost, where that is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What went wrong with an attempt, who is to blame, and how one knows."""

    kind: str  # crashed | node lost | silent | stalled start | refused | exited early | hung | slow | lying
    what: str  # one sentence
    blame: str  # "job" | "infrastructure"
    rank: Rank | None = None  # the culprit
    node: Node | None = None
    began_s: float = 0.0  # ago: when it happened, as far as is known
    signature: str = ""
    evidence: tuple[str, ...] = ()
    exit_code: int | None = None  # the culprit's; 128 + n for signal n
    error: str = ""  # the culprit's first error line
    slowdown: float | None = None  # share of the job's speed that it costs
    noticed: str = ""  # what crossed which bound; "" where its age says enough
    bound_s: float | None = None
    confidence: float = 1.0  # that it is this culprit
    step: int | None = None  # at which it happened, where that is not the gang's present one
    not_after: int | None = None  # states of this attempt past this step are not to be trusted


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    job: JobId
    reason: str
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A state that is in memory: the layout it was taken in, and who holds each rank's part, best first."""

    layout: Layout
    holders: tuple[tuple[Node, ...], ...]  # by rank of that layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Place(Change):
    """Start the next attempt: a row of the store first, then launches."""

    attempt: Attempt
    nodes: tuple[Node, ...]  # by node rank
    spares: tuple[Node, ...] = ()
    layout: Layout
    link: Link
    restore: Stored | None  # None: from nothing (or a script that restores itself)
    memory: Memory | None = None  # None: what is to be restored is in storage
    rung: str  # "first" | "in place" | "spare" | "fewer replicas" | "grow" | "requeued"


@dataclass(frozen=True, slots=True, kw_only=True)
class StandBy(Change):
    """Other spares for an attempt that runs: one came, or one is not usable any more."""

    attempt: Attempt
    spares: tuple[Node, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Go(Change):
    """Every node is prepared: start the ranks."""

    attempt: Attempt
    master: tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped(Change):
    """The attempt completed its first step: the job runs, its incident is over."""

    attempt: Attempt
    step: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class End(Change):
    """End the attempt's ranks wherever they can be reached. Nothing starts before `Dead`."""

    attempt: Attempt
    grace_s: float = 0.0
    verdict: Verdict | None = None  # None: wanted by a person, or to grow
    moves: bool = False  # off nodes that will go: the grace is its ranks' although it will run on
    finish_s: float = 0.0  # a rank that has a regular file open for writing gets this long to finish it


@dataclass(frozen=True, slots=True, kw_only=True)
class Dead(Change):
    """Nothing of the attempt can step, write or come back."""

    attempt: Attempt
    how: str  # "confirmed" | "fenced" | "self-fence" | "lease"


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete(Change):
    attempt: Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeue(Change):
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp(Change):
    """The job failed for good."""

    exit_code: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest(Change):
    """A queued job becomes suspended or cancelled, as its owner wants."""

    to: str  # "suspended" | "cancelled" | "queued"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait(Change):
    """Nothing changes, and why. Written down only when the reason is a new one.

    Its figures are bounds, not ages, so that the reason stays the same while the wait lasts.
    """

    due_s: float = 0.0  # from now, when the wait ends by itself or is looked at from another side


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect(Change):
    """Ask a node for something the decision needs; the answer comes in a later view."""

    kind: str  # "inventory"
    node: Node
    within_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Examine(Change):
    """Look closely at every rank of an attempt; what was found comes in a later view."""

    attempt: Attempt
    nodes: tuple[Node, ...]
    within_s: float
    stacks: bool = True  # False: only at processes and connections, which costs next to nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Save(Change):
    """Write a state that is in memory into the checkpoint folder; what came of it is in a later view."""

    at: Stored
    memory: Memory
    within_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Find(Change):
    """Something that people should know and nothing is done about: told once in an attempt."""

    attempt: Attempt
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Something is wrong, or may be, but nothing can be done about it yet."""

    reason: str
    due_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkNode:
    node: Node
    event: NodeEvent
    reason: str


JobChange = (
    Place
    | StandBy
    | Go
    | Stepped
    | End
    | Dead
    | Complete
    | Requeue
    | GiveUp
    | Rest
    | Wait
    | Collect
    | Examine
    | Save
    | Find
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    changes: tuple[JobChange, ...] = ()
    marks: tuple[MarkNode, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The operator's bounds. Seconds unless a name says otherwise."""

    silent_after_s: float = 3.0  # without a word from an agent that should report each second
    silent_gang_bound_s: float = 15.0  # a silent node *and* no step of its gang for this long: end the rest
    prepare_within_s: float = 300.0  # the job's own bound holds where it is shorter
    start_within_s: float = 600.0  # from go to a rank's first sign of life; steps may take longer
    end_within_s: float = 60.0  # then the reason names what does not die
    return_within_s: float = 10.0  # agents' time to come back after a controller's start
    fence_margin_s: float = 5.0
    cut_for_s: float = 600.0  # after a link was found cut nothing is fetched from the node at its bad end
    leave_before_s: float = 60.0  # a node's going: then a gang leaves it, wherever it may go
    orphan_lease_s: float = 3600.0  # the job's own bound holds where it is shorter (death.orphan_lease_s)
    collect_within_s: float = 10.0
    backoff_first_s: float = 1.0  # at least; the rest is the job's to say
    backoff_max_s: float = 300.0  # at most
    same_failure_max: int = 3  # the same signature at the same step, without progress between: a crash loop
    unlucky_max: int = 3  # restarts in a row after the infrastructure's failures that wait for nothing
    no_progress_max: int = 10  # attempts in a row without a new step, whoever is to blame
    grow_after_s: float = 10.0  # a returned node must have been ready for this long
    grow_within_s: float = 600.0  # how long growing waits for a checkpoint to grow from
    save_within_s: float = 300.0  # for what is in memory to be stored before its holders are let go of
    examine_within_s: float = 3.0  # for agents to say how their ranks are
    examine_again_s: float = 30.0  # what was seen closely longer ago is looked at anew before it counts
    examine_soon_s: float = 1.0  # between two looks that must agree
    suspect_s: float = (
        5.0  # a standstill in an unknown phase is looked at closely from here on at the earliest
    )
    say_still_s: float = 60.0  # and told of from here on
    start_warm_s: float = 1.0  # until a job's own starts were measured
    start_cold_s: float = 10.0
    queue_s: float = 1.0  # until the queue serves a job that gave its nodes up
    swap_s: float = 0.5  # a new node's share of the state has to be brought to it
    nodes_back_s: float = 600.0  # how long a job is taken to do with fewer replicas
    slow_after_s: float = 60.0  # a gang that was held up by the same node for so long may be helped
    slow_horizon_s: float = 3600.0  # what a swap wins back is counted for so long
    swap_gain_min: float = 10.0  # and must be so many times what it costs
    swap_confidence_min: float = 0.8
    settle_s: float = 1.0  # how long a death that looks like a peer's fault waits for word of that peer
    step_bound_factor: float = 3.0  # a gang has stopped when it is this many usual steps late
    in_place_max: int = 3  # fruitless failures that began on one node, before others are tried first
    lived_s: float = 600.0  # an attempt that shows no steps and lasted this long has made progress
    hold_after_s: float = 300.0  # a job that waited this long has nodes held for it against later ones
