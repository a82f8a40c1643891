"""What a person may ask of a node's life, and the answer when somebody else was there first."""

from dataclasses import dataclass, replace

from keepstep.core.errors import Refused
from keepstep.core.ids import Node
from keepstep.core.rules import Action, TriagePolicy
from keepstep.core.states import LIFE, LifeEvent, LifeState
from keepstep.decide import life as li
from keepstep.decide.life import KEEPSTEP, SCREENING, Life, Need, Note, Outcome, moved

VERBS = ("cordon", "drain", "uncordon", "validate", "note")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    verb: str
    who: str
    reason: str = ""
    deadline_s: float | None = None  # of a drain; None: the policy's
    revision: int | None = None  # of the life that the person was looking at


def granted(life: Life, wish: Wish, policy: TriagePolicy, now: float) -> Life:
    """The life after it; the same one where it is so already. Errors: Refused, with who was first."""
    if wish.verb == "note":
        return replace(
            life, notes=(*life.notes, Note(at=now, by=wish.who, text=wish.reason))[-li.NOTES_MAX :]
        )
    if wish.revision is not None and wish.revision != life.revision:
        raise Refused(
            f"node {life.node} has changed since you looked at it",
            why=f"it is {standing(life)}",
            next=f"Look with `keepstep node describe {life.node}`, then repeat it if you still want to.",
        )
    match wish.verb:
        case "cordon":
            return _cordon(life, wish, now)
        case "drain":
            return _drain(life, wish, policy, now)
        case "uncordon":
            return _uncordon(life, wish, now)
        case "validate":
            return _validate(life, wish, policy, now)
        case _:
            raise AssertionError(wish.verb)


def screened(life: Life, who: str, why: str, now: float) -> Life:
    """A screening found it sick: it is validated as soon as the breaker lets it go. Out already: no news."""
    if not life.works:
        return life
    need = Need(
        rule=SCREENING, component="", action=Action.DIAGNOSE, key=SCREENING, at=now,
        reason=f"{SCREENING} for {who}: {why}", check=False,
    )  # fmt: skip
    return replace(life, needs=(*(one for one in life.needs if one.key != SCREENING), need))


def standing(life: Life) -> str:
    """A life in words: its state, whose it is, and why."""
    by = f" by {life.owner}" if not life.works else ""
    return f"{life.state}{by}{f': {life.reason}' if life.reason else ''}"


def _why(wish: Wish) -> str:
    return f"{wish.verb} by {wish.who}" + (f": {wish.reason}" if wish.reason else "")


def _cordon(life: Life, wish: Wish, now: float) -> Life:
    if life.state is LifeState.CORDONED and life.owner == wish.who:
        return life
    if life.state is LifeState.CORDONED and life.owner == KEEPSTEP:
        taken = replace(
            life, owner=wish.who, reason=_why(wish), due=None, since=now, revision=life.revision + 1
        )
        return replace(taken, plan=Action.NOTHING)
    if not LIFE.allows(life.state, LifeEvent.CORDON):
        raise _first(life, wish)
    return moved(replace(life, plan=Action.NOTHING), LifeEvent.CORDON, now, _why(wish), owner=wish.who)


def _drain(life: Life, wish: Wish, policy: TriagePolicy, now: float) -> Life:
    due = now + (policy.deadlines.drain_s if wish.deadline_s is None else wish.deadline_s)
    if life.state is LifeState.DRAINING and life.owner in (wish.who, KEEPSTEP):
        later = replace(life, owner=wish.who, due=due, reason=_why(wish), revision=life.revision + 1)
        return later if wish.deadline_s is not None or life.owner != wish.who else life
    if not LIFE.allows(life.state, LifeEvent.DRAIN):
        raise _first(life, wish)
    return moved(
        replace(life, plan=Action.NOTHING), LifeEvent.DRAIN, now, _why(wish), owner=wish.who, due=due
    )


def _uncordon(life: Life, wish: Wish, now: float) -> Life:
    if life.state is LifeState.HEALTHY:
        raise Refused(
            f"node {life.node} is not cordoned",
            why=f"it is healthy{f', {life.reason}' if life.reason else ''}",
        )
    if life.state is LifeState.REPAIRING and life.repair and life.repair.outcome is Outcome.BEGUN:
        raise Refused(
            f"node {life.node} is being repaired",
            why=f"{life.repair.action} began ({life.repair.key}) and has not ended",
            next="Wait for its end or its deadline: a job would be started on a node that goes down.",
        )
    known = frozenset(life.stands) | frozenset(need.key for need in life.needs if need.check)
    back = replace(life, needs=(), excused=life.excused | known, plan=Action.NOTHING)
    return moved(back, LifeEvent.UNCORDON, now, _why(wish), owner=wish.who)


def _validate(life: Life, wish: Wish, policy: TriagePolicy, now: float) -> Life:
    due = now + policy.deadlines.validate_s
    if life.state in (LifeState.QUARANTINED, LifeState.REPLACE):
        event = LifeEvent.VALIDATE if life.state is LifeState.QUARANTINED else LifeEvent.REPLACED
        return moved(life, event, now, _why(wish), due=due)
    need = Need(
        rule="asked",
        component="",
        action=Action.DIAGNOSE,
        key="asked",
        at=now,
        reason=_why(wish),
        check=False,
    )
    life = replace(life, needs=(*life.needs, need))
    if life.state in (LifeState.CORDONED, LifeState.DRAINING):
        plan = max(life.plan, Action.DIAGNOSE, key=lambda action: action.severity)
        return replace(life, owner=KEEPSTEP, plan=plan, reason=_why(wish), revision=life.revision + 1)
    if not LIFE.allows(life.state, LifeEvent.CORDON):
        raise _first(life, wish)
    cordoned = moved(life, LifeEvent.CORDON, now, _why(wish), due=now + policy.deadlines.idle_s)
    return replace(cordoned, plan=Action.DIAGNOSE)


def _first(life: Life, wish: Wish) -> Refused:
    node: Node = life.node
    return Refused(
        f"node {node} cannot be asked to {wish.verb}: it is already {life.state}",
        why=f"{life.owner} was first{f': {life.reason}' if life.reason else ''}",
        next=f"`keepstep node history {node}` shows who and why; `keepstep node note {node} TEXT` adds.",
    )
