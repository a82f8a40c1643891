"""The next step of a node's life: what it needs, what is on it, what its repair and its validation came to.

`advance` looks at levels only and makes at most one step of `core.states.LIFE` at a time, so it may be asked
as often as one likes and after any restart. What a person has taken out only a person brings back.
"""

from dataclasses import dataclass, replace

from keepstep.core.ids import JobId
from keepstep.core.rules import Action, TriagePolicy
from keepstep.core.states import LIFE, LifeEvent, LifeState
from keepstep.decide import life as li
from keepstep.decide.breaker import Room
from keepstep.decide.life import KEEPSTEP, Life, Need, Outcome, Repair, moved

HOOK_OF = {Action.RESET: "reset", Action.RESET_IDLE: "reset", Action.REBOOT: "reboot"}
_NEXT = {
    Action.NOTHING: Action.RESET,
    Action.DIAGNOSE: Action.RESET,
    Action.RESET_IDLE: Action.REBOOT,
    Action.RESET: Action.REBOOT,
    Action.REBOOT: Action.REPLACE,
    Action.REPLACE: Action.REPLACE,
}
_SUMMED = ("suspicion", "suspect", li.SCREENING)  # needs that come of many events
_SOONER_S = 5.0  # what is told anew of a deadline is no news within this
_SERVED = 0.5  # a suspicion is over at this share of what it took


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is true of a node beside its life."""

    idle: bool = True  # nothing of any attempt is on it, or placed on it
    job: JobId | None = None  # whose attempt is
    connected: bool = True
    rack: str = ""
    gpus: tuple[str, ...] = ()
    pool: str = ""
    leaves: str = ""  # why its pool will take it away, or ""
    leaves_in_s: float | None = None  # None: it did not say when


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One change of a life; `told` goes into the timeline."""

    life: Life
    told: str
    event: LifeEvent | None = None  # None: nothing moves, but it should be said
    held: bool = False  # the breaker holds it


def advance(life: Life, at: Situation, policy: TriagePolicy, now: float, room: Room) -> Step | None:
    """The next step, or None while nothing changes."""
    taken = _of_its_pool(life, at, policy, now)
    if taken is not None:
        return taken
    match life.state:
        case LifeState.HEALTHY | LifeState.PROBATION | LifeState.SUSPECT:
            return _in_service(life, at, policy, now, room)
        case LifeState.CORDONED | LifeState.DRAINING:
            return _leaving(life, at, policy, now)
        case LifeState.QUARANTINED:
            return _quarantined(life, at, policy, now)
        case LifeState.REPAIRING:
            return _repairing(life, at, policy, now)
        case LifeState.VALIDATING:
            return _validating(life, policy, now)
        case LifeState.REPLACE:
            return _replaced(life, at, policy, now)


def _of_its_pool(life: Life, at: Situation, policy: TriagePolicy, now: float) -> Step | None:
    """What a pool takes away drains, whatever the breaker says; what stays after all is put back."""
    its_pool = f"pool {at.pool}"  # an owner that no person is called
    if not at.leaves:
        if life.owner == its_pool and LIFE.allows(life.state, LifeEvent.UNCORDON):
            return _step(life, LifeEvent.UNCORDON, now, f"{its_pool} lets it stay")
        return None
    due = now + (policy.deadlines.drain_s if at.leaves_in_s is None else at.leaves_in_s)
    reason = f"{its_pool} takes it away: {at.leaves}"
    if LIFE.allows(life.state, LifeEvent.DRAIN):
        owner = life.owner if not life.works and life.by_person else its_pool
        gone = replace(life, plan=Action.NOTHING, out_job=at.job, out_rack=at.rack)
        after = moved(gone, LifeEvent.DRAIN, now, reason, owner=owner, due=due)
        return Step(life=after, told=reason, event=LifeEvent.DRAIN)
    sooner = life.due is None or due < life.due - _SOONER_S
    if life.state is LifeState.DRAINING and at.leaves_in_s is not None and sooner:
        return Step(life=replace(life, due=due), told=f"{reason}, in {at.leaves_in_s:.0f} s")
    return None


# ---------------------------------------------------------------------- in service


def _in_service(life: Life, at: Situation, policy: TriagePolicy, now: float, room: Room) -> Step | None:
    need = _most(life, policy, now)
    if need is not None and (need.action.takes_out or life.works):
        if life.by_person:
            life = replace(life, owner=KEEPSTEP)
        return _out(life, need, at, policy, now, room)
    if life.state is LifeState.PROBATION and life.due is not None and now >= life.due:
        hours = policy.deadlines.probation_s / 3600
        return _step(life, LifeEvent.PROVE, now, f"well for {hours:g} h since it came back")
    if life.state is not LifeState.SUSPECT:
        return None
    if life.due is not None and now >= life.due:
        hours = policy.deadlines.suspect_s / 3600
        reason = f"has been suspect for {hours:g} h ({life.reason})"
        asked = Need(
            rule="suspect",
            component="",
            action=Action.DIAGNOSE,
            key="suspect",
            at=now,
            reason=reason,
            check=False,
        )
        return _out(replace(life, needs=(*life.needs, asked)), asked, at, policy, now, room)
    if life.needs and not life.pressing:
        return _not_its_fault(life, now)
    calm = li.suspicion(life.entries, now, policy.suspicion) < _SERVED * policy.suspicion.out_at
    if not life.pressing and calm and now - life.since >= policy.hysteresis.cool_down_s:
        minutes = policy.hysteresis.cool_down_s / 60
        return _step(life, LifeEvent.CLEAR, now, f"nothing speaks against it any more, for {minutes:g} min")
    return None


def _most(life: Life, policy: TriagePolicy, now: float) -> Need | None:
    """The most severe need; many watched events are one, too."""
    if life.pressing:
        return life.pressing[0]
    score = li.suspicion(life.entries, now, policy.suspicion)
    if life.state is LifeState.SUSPECT or score < policy.suspicion.out_at:
        return None
    seen = sorted({entry.rule for entry in life.entries if entry.action is Action.WATCH and not entry.blamed})
    reason = f"suspicion {score:.1f}, from {', '.join(seen)}"
    action = Action.DIAGNOSE if life.state is LifeState.PROBATION else Action.SUSPECT
    return Need(
        rule="suspicion", component="", action=action, key="suspicion", at=now, reason=reason, check=False
    )


def _out(life: Life, need: Need, at: Situation, policy: TriagePolicy, now: float, room: Room) -> Step | None:
    action = need.action
    if life.state is LifeState.PROBATION and action is Action.SUSPECT:
        action = Action.DIAGNOSE
    compared = bool(at.rack or at.job) and need.key not in _SUMMED
    if compared and (need.alone or not action.drains) and now - need.at < policy.correlation.within_s:
        return None  # no hurry: until then others may show that it is not its fault
    if life.works:
        held = room.held(life.node, at.rack, at.job)
        if held:
            return Step(life=life, told=f"{need.reason}; {held}", held=True)
        room.take(at.rack, at.job)
        life = replace(life, out_job=at.job, out_rack=at.rack)
    if not action.takes_out:
        return _step(life, LifeEvent.SUSPECT, now, need.reason, due=now + policy.deadlines.suspect_s)
    life = replace(life, plan=action, gpus=at.gpus, booted_out=False)
    if action.drains:
        due = now if need.at_once else now + policy.deadlines.drain_s
        return _step(life, LifeEvent.DRAIN, now, need.reason, due=due)
    return _step(life, LifeEvent.CORDON, now, need.reason, due=now + policy.deadlines.idle_s)


# ---------------------------------------------------------------------- on its way out


def _leaving(life: Life, at: Situation, policy: TriagePolicy, now: float) -> Step | None:
    pressing = life.pressing
    graver = bool(pressing) and pressing[0].action.severity > life.plan.severity and not life.by_person
    if graver:
        life = replace(life, plan=pressing[0].action)
    # An empty node has time: until then others may show that it was not its fault.
    settled = life.by_person or now - life.since >= policy.correlation.within_s
    if life.state is LifeState.DRAINING:
        if at.idle and settled:
            return _step(life, LifeEvent.EMPTY, now, f"nothing runs on it any more; {life.reason}", kept=True)
        sooner = any(need.at_once for need in pressing) and life.due is not None and life.due > now
        if sooner:
            return Step(life=replace(life, due=now), told=f"{pressing[0].reason}: its job is ended now")
        if graver:
            return Step(life=replace(life, reason=pressing[0].reason), told=pressing[0].reason)
        return None if life.by_person else _not_its_fault(life, now)
    if life.by_person:
        return None
    if life.plan.drains and pressing:
        due = now if pressing[0].at_once else now + policy.deadlines.drain_s
        return _step(life, LifeEvent.DRAIN, now, pressing[0].reason, due=due)
    back = _not_its_fault(life, now)
    if back is not None:
        return back
    if at.idle and settled:
        return _step(life, LifeEvent.EMPTY, now, f"nothing runs on it any more; {life.reason}")
    if life.due is not None and now >= life.due:
        days = policy.deadlines.idle_s / 86_400
        due = now + policy.deadlines.drain_s
        return _step(
            life, LifeEvent.DRAIN, now, f"{life.reason}; its job did not end within {days:g} days", due=due
        )
    return None


def _not_its_fault(life: Life, now: float) -> Step | None:
    if life.pressing:
        return None
    step = _step(
        life, LifeEvent.CLEAR, now, f"what it was taken out for is gone or not its own: {life.reason}"
    )
    return replace(step, life=replace(step.life, plan=Action.NOTHING, out_at=None))  # it never left


# ---------------------------------------------------------------------- out of service


def _quarantined(life: Life, at: Situation, policy: TriagePolicy, now: float) -> Step | None:
    if life.by_person or life.for_person:
        return None
    due = now + policy.deadlines.validate_s
    if life.needs and not life.pressing:
        life = replace(life, plan=Action.NOTHING)  # it was not its fault after all
    if life.plan in (Action.NOTHING, Action.DIAGNOSE, Action.SUSPECT):
        return _step(life, LifeEvent.VALIDATE, now, f"is validated: {life.reason}", due=due)
    if life.plan is Action.REPLACE:
        return _step(life, LifeEvent.CONDEMN, now, f"{life.reason}; repairs are over")
    if life.booted_out:
        return _step(life, LifeEvent.VALIDATE, now, f"was booted anew meanwhile; {life.reason}", due=due)
    name = HOOK_OF[life.plan]
    hook = policy.hooks.get(name)
    if hook is None:
        how = f"needs a {name}, for which there is no hook: do it, then keepstep node validate {life.node}"
        told = f"{life.reason}; {how}"
        return None if life.reason.endswith(how) else Step(life=replace(life, reason=told), told=told)
    key = f"{life.node}/{life.revision}/{name}"
    repair = Repair(key=key, action=life.plan, at=now, epoch=life.epoch)
    begun = replace(life, repairs=(*life.repairs, repair)[-li.REPAIRS_MAX :])
    due = now + hook.within_s * hook.tries + policy.deadlines.return_s
    return _step(begun, LifeEvent.REPAIR, now, f"{name} begins ({key}); {life.reason}", due=due)


def _repairing(life: Life, at: Situation, policy: TriagePolicy, now: float) -> Step | None:
    repair = life.repair
    assert repair is not None
    name = HOOK_OF[repair.action]
    if repair.outcome is Outcome.FAILED:
        return _failed(life, now, f"{name} failed: {repair.text}", policy)
    back = at.connected and (repair.action is not Action.REBOOT or life.epoch != repair.epoch)
    if repair.outcome is Outcome.DONE and back:
        due = now + policy.deadlines.validate_s
        return _step(life, LifeEvent.REPAIRED, now, f"{name} is done and it reports again", due=due)
    if life.due is not None and now >= life.due:
        late = ended(life, Outcome.LATE, "") if repair.outcome is Outcome.BEGUN else life
        what = (
            "did not come to an end" if repair.outcome is Outcome.BEGUN else "is done, and it does not report"
        )
        return _failed(late, now, f"{name} {what} in time", policy)
    return None


def _validating(life: Life, policy: TriagePolicy, now: float) -> Step | None:
    worse = [need for need in life.pressing if need.at >= life.since and need.action.takes_out]
    if worse:
        return _failed(life, now, f"while it was validated: {worse[0].reason}", policy)
    if life.due is not None and now >= life.due and not life.by_person:
        return _failed(life, now, "its validation did not come to an end in time", policy)
    return None


def validated(life: Life, *, passed: bool, why: str, policy: TriagePolicy, now: float) -> Step:
    """What a validation came to: on to probation, or back for the next repair.

    Errors: UnknownTransition where the node is not validating.
    """
    said = f": {why}" if why else ""
    if not passed:
        return _failed(life, now, f"its validation failed{said}", policy)
    clean = replace(life, needs=(), stands={}, plan=Action.NOTHING)
    due = now + policy.deadlines.probation_s
    return _step(clean, LifeEvent.PASS, now, f"its validation passed{said}", due=due)


def untested(life: Life, *, why: str, now: float) -> Step:
    """A validation in which nothing could be tested proves nothing: the node does not return, and no repair
    of hardware would change that. It stays quarantined, for a person.

    Errors: UnknownTransition where the node is not validating.
    """
    how = f"mend that, then keepstep node validate {life.node}"
    step = _step(life, LifeEvent.FAIL, now, f"nothing could be tested: {why}; {how}")
    return replace(step, life=replace(step.life, for_person=True))


def _failed(life: Life, now: float, why: str, policy: TriagePolicy) -> Step:
    """Back to quarantine, for the next repair. Too many of them in a row: for none any more."""
    plan = _NEXT.get(life.plan, Action.RESET)
    many = li.repairs_within(life, now, policy.lemon.repairs_s) >= policy.lemon.repairs_max
    plan = Action.REPLACE if many else plan
    return _step(replace(life, plan=plan, booted_out=False), LifeEvent.FAIL, now, f"{why}; next: {plan}")


def _replaced(life: Life, at: Situation, policy: TriagePolicy, now: float) -> Step | None:
    """Other GPUs under the same name: another machine, or a new board."""
    if not at.connected or not at.gpus or not life.gpus or set(at.gpus) == set(life.gpus):
        return None
    fresh = replace(life, entries=(), repairs=(), counts={}, needs=(), stands={}, gpus=at.gpus)
    due = now + policy.deadlines.validate_s
    return _step(fresh, LifeEvent.REPLACED, now, "has other GPUs than before: it was replaced", due=due)


def ended(life: Life, outcome: Outcome, text: str) -> Life:
    """The present repair came to something."""
    assert life.repair is not None
    last = replace(life.repair, outcome=outcome, text=text)
    return replace(life, repairs=(*life.repairs[:-1], last))


def _step(
    life: Life, event: LifeEvent, now: float, reason: str, *, due: float | None = None, kept: bool = False
) -> Step:
    """`kept`: the owner stays the one that it was."""
    after = moved(life, event, now, reason, owner=life.owner if kept else KEEPSTEP, due=due)
    return Step(life=after, told=reason, event=event)
