"""What the store gives back: one frozen dataclass a table, and the changes each table takes.

Times are wall seconds since 1970 and for people; nothing is decided by them. States are the words of
`keepstep.core.states`, kept as text so that a store of another version can still be read. JSON columns come
back as plain dicts and lists; what goes into them may also be dataclasses, enums, tuples or msgspec structs.
"""

from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar

from keepstep.core.ids import Attempt, JobId, Node, Step, Term

Json = dict[str, Any]
Role = Literal["viewer", "submitter", "operator", "admin"]
TokenKind = Literal["user", "join", "agent"]
Wanted = Literal["run", "suspend", "cancel"]

ROLES: tuple[Role, ...] = ("viewer", "submitter", "operator", "admin")  # each may do what those before it may

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """A bounded part of a list; `next` goes into `after` for the part that follows, None at the end."""

    items: tuple[T, ...]
    next: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A controller process, told apart from every other one that was or will be."""

    host: str
    boot_id: str
    pid_namespace: str  # a pid says nothing to another container of the same host
    pid: int
    start_ticks: int  # a pid that was reused has another one
    instance: str
    url: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who may write. The term grows with every holder and is checked inside every write."""

    term: Term  # 0: nobody ever held it
    beat: int  # moves while the holder lives
    holder: Holder | None  # None: released, or never held
    acquired_at: float
    beat_at: float | None = None  # when the holder last moved it; for people and the ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A credential as it is listed: the secret is not in the store, only its hash is."""

    id: int
    name: str
    kind: TokenKind
    role: Role | None  # of a "user"
    node: Node | None  # of an "agent": the only node that it may speak for
    principal: str
    project: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None
    uses_left: int | None  # of a "join"; None: unbounded

    def allows(self, role: Role) -> bool:
        """Whether a user's token may do what `role` may; join and agent tokens have no role."""
        return self.role is not None and ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A new credential and, this once, its secret."""

    secret: str = field(repr=False)
    token: Token


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    id: JobId
    number: int  # 1-based, in order of submission
    name: str
    project: str
    principal: str
    spec: Json  # normalised
    source: Json  # file and folder it was submitted from
    pool: str
    queue: str
    priority: int
    attached_node: Node | None  # the terminal's node: when that goes, the job goes
    wanted: Wanted
    wanted_by: str
    wanted_reason: str
    state: str
    reason: str
    attempt: Attempt  # the present attempt's number; 0 before the first one
    restarts: Json  # what the budgets have used
    exit_code: int | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    not_before: float | None  # back-off, as the wall clock will show it


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    job: JobId
    number: Attempt
    term: Term  # that ordered it
    parent_attempt: Attempt | None
    parent_step: Step | None
    state: str
    rung: str
    reason: str
    nodes: tuple[Node, ...]  # by node rank
    spares: tuple[Node, ...]  # stand by, warm
    layout: Json
    restore: Json | None
    master: Json | None
    placed_at: float
    first_step_at: float | None
    ended_at: float | None
    outcome: str
    incident: int | None  # that ended it


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    name: Node
    pool: str
    role: str
    instance: str
    slots: int
    state: str
    state_reason: str
    addresses: list[str]
    labels: dict[str, str]
    gpus: list[Json]
    boot_id: str
    versions: Json
    first_seen: float
    last_seen: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LifeRow:
    """A node's life as hardware. `data` is the whole of it, as `keepstep.control.health` writes it."""

    node: Node
    state: str
    owner: str
    reason: str
    revision: int
    changed_at: float
    data: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What one validation of one node came to, and what it measured."""

    id: int
    node: Node
    at: float
    job: str
    passed: bool
    text: str
    figures: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    id: int
    project: str
    job: JobId | None
    attempt: Attempt | None
    verdict: str
    state: str
    culprit: Json  # rank, role, node: as far as they are known
    evidence: Json
    decision: int | None
    opened_at: float
    decided_at: float | None
    recovered_at: float | None
    closed_at: float | None
    costs: Json
    same_before: tuple[int, ...]  # earlier incidents of this verdict on this node, or at this rank of the job


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    id: int
    at: float
    term: Term
    project: str
    job: JobId | None
    kind: str
    reason: str
    rejected: list[Any]
    plan: Json
    slice: Json  # the job's part of the view that was decided upon


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """A line for the timeline; the store gives it its number, its time and the job's project."""

    kind: str
    text: str
    project: str = ""  # "": the job's
    principal: str = ""
    job: JobId | None = None
    attempt: Attempt | None = None
    node: Node | None = None
    incident: int | None = None
    data: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    id: int  # grows; never used twice
    at: float
    project: str
    principal: str
    job: JobId | None
    attempt: Attempt | None
    node: Node | None
    incident: int | None
    kind: str
    text: str
    data: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One completed step. None: no figure, or one that is not a number."""

    attempt: Attempt
    step: Step
    at: float
    loss: float | None
    grad_norm: float | None
    tokens_per_s: float | None
    tflops: float | None
    mfu: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The loss on one source's text that is not trained on; source "": over all of them. None: not finite."""

    attempt: Attempt
    step: Step
    source: str
    at: float
    loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    job: JobId
    attempt: Attempt
    step: Step
    seen_at: float
    complete: bool


class JobChanges(TypedDict, total=False):
    wanted: Wanted
    wanted_by: str
    wanted_reason: str
    state: str
    reason: str
    attempt: int
    restarts: Any
    exit_code: int | None
    started_at: float | None
    finished_at: float | None
    not_before: float | None
    priority: int


class AttemptChanges(TypedDict, total=False):
    state: str
    spares: Any
    reason: str
    restore: Any
    master: Any
    first_step_at: float | None
    ended_at: float | None
    outcome: str
    incident: int | None


class NodeChanges(TypedDict, total=False):
    pool: str
    role: str
    instance: str
    slots: int
    state: str
    state_reason: str
    addresses: Any
    labels: Any
    gpus: Any
    boot_id: str
    versions: Any


class IncidentChanges(TypedDict, total=False):
    verdict: str
    state: str
    culprit: Any
    evidence: Any
    decision: int | None
    decided_at: float | None
    recovered_at: float | None
    closed_at: float | None
    costs: Any
