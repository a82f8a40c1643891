"""One node's life as it is remembered: where it stands, why, and what was already acted upon.

Everything in a `Life` is stored, so that neither a controller's nor an agent's restart acts twice: counts
of faults by what they were when they were acted upon, checks that stand, needs that are not met yet. Moments
are **health time**: seconds that controllers watched (`keepstep.control.health`), never the wall clock, so a
clock that is set back or forth changes nothing.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from keepstep.core.ids import JobId, Node
from keepstep.core.rules import Action, Lemon, Suspicion
from keepstep.core.states import LIFE, WORKING, LifeEvent, LifeState

KEEPSTEP = "keepstep"  # owner of what no person asked for
SCREENING = "screening"  # key of what a screening says
ENTRIES_MAX = 200
REPAIRS_MAX = 50
NOTES_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One event in a node's history: a burst of the same fault on the same component counts once."""

    at: float
    last: float
    rule: str
    component: str
    action: Action
    count: int = 1
    blamed: str = ""  # "job:ID" or "rack:NAME": whose fault it was instead
    text: str = ""
    job: JobId | None = None  # that had the node
    rack: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What the node needs, until it has got it: a level, so it may wait without ever being replayed."""

    rule: str
    component: str
    action: Action
    key: str  # of the check that stands, or of the count
    at: float
    reason: str
    check: bool  # evidence that can be looked at again
    at_once: bool = False
    blamed: str = ""
    alone: bool = False  # it was blamed on others, who are well again


class Outcome(StrEnum):
    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"
    LATE = "late"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    key: str  # the same one is never done twice
    action: Action
    at: float
    outcome: Outcome = Outcome.BEGUN
    text: str = ""
    epoch: str = ""  # of the node when it began


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    at: float
    by: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    node: Node
    state: LifeState = LifeState.HEALTHY
    since: float = 0.0
    owner: str = KEEPSTEP  # or the person who took it out
    reason: str = ""
    due: float | None = None
    revision: int = 0  # grows with each change of state: two people at once are told apart by it
    epoch: str = ""
    gpus: tuple[str, ...] = ()  # seen before it was to be replaced
    plan: Action = Action.NOTHING  # of the time out that it is in
    out_at: float | None = None  # when it last left service, and ...
    out_job: JobId | None = None  # ... which job had it
    out_rack: str = ""
    ticket: str = ""  # that was opened for it
    booted_out: bool = False  # it was booted since then
    for_person: bool = False  # neither proven nor sick: only a person moves it on from here
    counts: Mapping[str, int] = field(default_factory=dict)  # acted upon, of this epoch
    stands: Mapping[str, Action] = field(default_factory=dict)  # checks acted upon that are not over
    excused: frozenset[str] = frozenset()  # checks that a person knew of when the node was put back
    needs: tuple[Need, ...] = ()
    entries: tuple[Entry, ...] = ()
    repairs: tuple[Repair, ...] = ()
    notes: tuple[Note, ...] = ()

    @property
    def works(self) -> bool:
        return self.state in WORKING

    @property
    def by_person(self) -> bool:
        return self.owner != KEEPSTEP

    @property
    def pressing(self) -> tuple[Need, ...]:
        """Needs of the node itself, the most severe first."""
        own = [need for need in self.needs if not need.blamed]
        return tuple(sorted(own, key=lambda need: -need.action.severity))

    @property
    def repair(self) -> Repair | None:
        return self.repairs[-1] if self.repairs else None

    def waits(self, now: float) -> bool:
        """Only its time can move it on: it works, and nothing speaks against it."""
        return self.works and not self.needs and self.due is not None and now < self.due

    @property
    def plain(self) -> bool:
        """Nothing about it has to be looked at again until it reports something."""
        return self.state is LifeState.HEALTHY and not self.needs


def moved(
    life: Life, event: LifeEvent, now: float, reason: str, *, owner: str = KEEPSTEP, due: float | None = None
) -> Life:
    """The next state by the table. Errors: UnknownTransition."""
    state = LIFE.next(life.state, event)
    left = life.works and state not in WORKING
    # What stands after a repair is found anew, and for the next time.
    stands = {} if state is LifeState.VALIDATING else life.stands
    return replace(
        life, stands=stands, state=state, since=now, owner=owner, reason=reason, due=due,
        revision=life.revision + 1, out_at=now if left else life.out_at, for_person=False,
    )  # fmt: skip


def suspicion(entries: Iterable[Entry], now: float, rule: Suspicion) -> float:
    """Each watched event weighs one, and less with time; what was somebody else's fault weighs nothing."""
    return math.fsum(
        2.0 ** -((now - entry.last) / rule.half_life_s)
        for entry in entries
        if entry.action is Action.WATCH and not entry.blamed
    )


_WEEK_S = 7 * 86_400.0
_WEIGHTS = {Action.RESTART: 0.25, Action.SUSPECT: 0.25, Action.DIAGNOSE: 0.5, Action.RESET_IDLE: 0.5}


def lemon(entries: Iterable[Entry], now: float, rule: Lemon) -> float:
    """How much a node has cost lately. A reset, a reboot or a replacement weighs one, lesser things less."""
    return math.fsum(
        _WEIGHTS.get(entry.action, 1.0 if entry.action.drains else 0.0)
        * 2.0 ** -((now - entry.at) / rule.half_life_s)
        for entry in entries
        if not entry.blamed
    )


def lemon_by_week(entries: Iterable[Entry], now: float, rule: Lemon, weeks: int) -> tuple[float, ...]:
    """The score as it was at the end of each week, this one last."""
    entries = tuple(entries)
    ends = [now - week * _WEEK_S for week in reversed(range(weeks))]
    return tuple(lemon((e for e in entries if e.at <= end), end, rule) for end in ends)


def repairs_within(life: Life, now: float, seconds: float) -> int:
    return sum(repair.outcome is not Outcome.BEGUN and now - repair.at <= seconds for repair in life.repairs)


def remembered(life: Life, entry: Entry) -> Life:
    return replace(life, entries=(*life.entries, entry)[-ENTRIES_MAX:])
