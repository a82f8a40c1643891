"""From what a node reports to what it needs: levels and counts in, findings out, each of them once.

A **count** (an XID since boot) is acted upon where it is larger than when it was last acted upon; how much
larger does not matter. What comes within a minute of the same on the same component is the same burst.
A **check** (a level) is acted upon when it has stood in `hysteresis.bad` reports in a row, and is over after
`hysteresis.good` without it. The action follows from the rule and from how often the same was found on the
same component within the rule's time. Whose fault it is if others show the same: `correlate`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from keepstep.core.ids import JobId, Node
from keepstep.core.rules import BY_NUMBER, Action, Class, Rule, TriagePolicy
from keepstep.core.states import HELD, LifeState
from keepstep.decide import life as li
from keepstep.decide.life import Entry, Life, Need

_TEXT_MAX = 200
# While a repair is under way the hardware says all kinds of things.
_DEAF = frozenset({LifeState.QUARANTINED, LifeState.REPAIRING, LifeState.REPLACE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A check that is not well in this report."""

    name: str
    component: str = ""
    level: str = "bad"
    value: float = 0.0
    text: str = ""
    for_s: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.name}|{self.component}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Events of one kind on one component since boot."""

    kind: str
    code: int = 0
    component: str = ""
    count: int = 1
    age_s: float = 0.0  # of the last one
    text: str = ""
    elsewhere: bool = False  # another node of the same machine answers for it

    @property
    def key(self) -> str:
        return f"{self.kind} {self.code}|{self.component}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One look at one node. `epoch` "": nothing is known of its counts."""

    epoch: str = ""
    checks: tuple[Standing, ...] = ()
    faults: tuple[Counted, ...] = ()
    first: bool = False  # since the controller's start: nobody saw how the node came to its epoch
    unwatched_s: float = 0.0  # since its last report: what is older than that was told before, or is the past
    boot_elsewhere: bool = False  # another node of the same machine answers for its boots


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Something new, with what its rule says about it."""

    node: Node
    rule: Rule
    component: str
    action: Action
    times: int
    at: float
    key: str
    check: bool
    what: str  # "XID 48 on GPU-1f"
    count: int = 1

    @property
    def reason(self) -> str:
        again = "" if self.times == 1 else f", for the {_ordinal(self.times)} time"
        return f"{self.what}{again} ({self.rule.name}): {self.action}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Triaged:
    life: Life
    streaks: Mapping[str, int]  # by check: reports in a row with it, or (negative) without it
    found: tuple[Found, ...] = ()
    past: tuple[str, ...] = ()  # what happened before anybody watched: counted, never acted upon
    urgent: bool = False  # must be stored now; else within the burst's gap


@dataclass(slots=True)
class _Look:
    life: Life
    policy: TriagePolicy
    now: float
    found: list[Found] = field(default_factory=list)
    past: list[str] = field(default_factory=list)


def triage(
    life: Life, report: Report, streaks: Mapping[str, int], policy: TriagePolicy, now: float
) -> Triaged:
    """Take one report in. Pure: the same report twice finds nothing the second time."""
    look = _Look(life, policy, now)
    if report.epoch:
        _epoch(look, report)
        for fault in report.faults:
            _fault(look, fault, report.unwatched_s)
    after = _checks(look, report.checks, streaks)
    urgent = bool(look.found or look.past) or _gist(look.life) != _gist(life)
    return Triaged(
        life=look.life, streaks=after, found=tuple(look.found), past=tuple(look.past), urgent=urgent
    )


def needed(life: Life, found: Found, *, blamed: str = "", job: JobId | None = None, rack: str = "") -> Life:
    """What was found, as an entry of the node's history and, where something is to be done, as a need."""
    text = found.reason[:_TEXT_MAX]
    entry = Entry(
        at=found.at, last=found.at, rule=found.rule.name, component=found.component, action=found.action,
        count=found.count,
        blamed=blamed, text=text, job=job, rack=rack,
    )  # fmt: skip
    life = li.remembered(life, entry)
    asks = found.action is Action.SUSPECT or found.action.takes_out
    if not asks or (blamed and not found.check):
        return life
    need = Need(
        rule=found.rule.name, component=found.component, action=found.action, key=found.key, at=found.at,
        reason=text, check=found.check, at_once=found.rule.at_once, blamed=blamed,
    )  # fmt: skip
    return replace(life, needs=(*(one for one in life.needs if one.key != need.key), need))


# ---------------------------------------------------------------------- counts


def _epoch(look: _Look, report: Report) -> None:
    """Counts begin anew with each boot. One that nobody asked for is an event itself."""
    life, epoch = look.life, report.epoch
    if epoch == life.epoch:
        return
    known = bool(life.epoch) and not report.first
    gone = tuple(need for need in life.needs if need.check)  # what a count says is gone with its boot
    needs = gone if life.works or life.state is LifeState.SUSPECT else life.needs
    booted_out = bool(life.epoch) and not life.works
    look.life = replace(life, epoch=epoch, counts={}, needs=needs, booted_out=booted_out)
    if known and not report.boot_elsewhere and (life.works or life.state is LifeState.SUSPECT):
        _find(look, "node.rebooted", 0, "", look.now, "boot", "an unexpected boot")


def _fault(look: _Look, fault: Counted, unwatched_s: float) -> None:
    rule = look.policy.rule(fault.kind, fault.code)
    if rule is None or set(rule.actions) == {Action.NOTHING}:
        return
    before = look.life.counts.get(fault.key, 0)
    if fault.count <= before:
        return
    look.life = replace(look.life, counts={**look.life.counts, fault.key: fault.count})
    if fault.elsewhere:
        return
    at = look.now - max(0.0, fault.age_s)
    if any(repair.at > at for repair in look.life.repairs):
        return  # its cause has been repaired since; only the word of it comes late
    what = f"{_named(fault)}{f' on {fault.component}' if fault.component else ''}"
    if fault.age_s > look.policy.hysteresis.past_s + unwatched_s:
        look.past.append(f"{what}, {fault.age_s / 3600:.1f} h ago")
        return
    _find(look, fault.kind, fault.code, fault.component, at, fault.key, what, count=fault.count - before)


def _find(
    look: _Look, kind: str, code: int, component: str, at: float, key: str, what: str, *, count: int = 1
) -> None:
    rule = look.policy.rule(kind, code)
    if rule is None or look.life.state in _DEAF:
        return
    if _same_burst(look, rule, component, at, count):
        return
    if rule.needs is not None:
        noted = [e for e in _of(look.life, rule, component) if at - e.last <= rule.needs.within_s]
        if sum(entry.count for entry in noted) + count < rule.needs.times:
            entry = Entry(
                at=at, last=at, rule=rule.name, component=component, action=Action.NOTHING, count=count
            )
            look.life = li.remembered(look.life, entry)
            return
    _decide(look, rule, component, at, key, what, check=False, count=count)


def _same_burst(look: _Look, rule: Rule, component: str, at: float, count: int) -> bool:
    """More of what was just found: it is written to the same entry."""
    limits = look.policy.hysteresis
    for index in range(len(look.life.entries) - 1, -1, -1):
        entry = look.life.entries[index]
        if (entry.rule, entry.component) != (rule.name, component):
            continue
        close = abs(at - entry.last) <= limits.burst_gap_s and at - entry.at <= limits.burst_s
        if not close or (rule.needs is not None and entry.action is Action.NOTHING):
            return False
        more = replace(entry, last=max(at, entry.last), count=entry.count + count)
        entries = (*look.life.entries[:index], more, *look.life.entries[index + 1 :])
        look.life = replace(look.life, entries=entries)
        return True
    return False


# ---------------------------------------------------------------------- checks


def _checks(look: _Look, checks: tuple[Standing, ...], streaks: Mapping[str, int]) -> dict[str, int]:
    limits, after = look.policy.hysteresis, {}
    standing = {check.key: check for check in checks}
    for key, check in standing.items():
        rule = look.policy.rule(check.name)
        if rule is not None and check.for_s < rule.stands_s and key not in look.life.stands:
            continue  # one sample so far, told in several reports
        after[key] = min(max(streaks.get(key, 0), 0) + 1, limits.bad)
        if after[key] >= limits.bad and key not in look.life.excused:
            _stands(look, check)
    for key in {*streaks, *look.life.stands, *look.life.excused} - set(standing):
        known = key in look.life.stands or key in look.life.excused
        without = min(streaks.get(key, 0), 0) - 1
        if known and -without < limits.good:
            after[key] = without
        elif known:
            _over(look, key)
    return after


def _stands(look: _Look, check: Standing) -> None:
    rule = look.policy.rule(check.name)
    if rule is None or (rule.level == "bad" and check.level != "bad") or look.life.state in _DEAF:
        return
    settles = look.now - look.life.since < look.policy.hysteresis.burst_gap_s
    if look.life.state is LifeState.VALIDATING and settles:
        return  # as it was before the repair: probes look again soon
    obeyed = rule.obeys.get(int(check.value)) if rule.obeys else None
    action = obeyed or rule.actions[0]
    before = look.life.stands.get(check.key)
    if before is not None and before.severity >= action.severity:
        return
    look.life = replace(look.life, stands={**look.life.stands, check.key: action})
    if action is Action.NOTHING:
        return
    what = f"{check.name}{f' on {check.component}' if check.component else ''}"
    what += f" ({check.text})" if check.text else ""
    if before is None and _same_burst(look, rule, check.component, look.now, 1):
        return
    _decide(look, rule, check.component, look.now, check.key, what, check=True, obeyed=obeyed)


def _over(look: _Look, key: str) -> None:
    life = look.life
    stands = {one: action for one, action in life.stands.items() if one != key}
    needs = life.needs
    if life.works or life.state in (LifeState.SUSPECT, LifeState.CORDONED):
        # What has left service is repaired and validated; what has not is looked at as it is now.
        needs = tuple(need for need in needs if need.key != key or (need.action.drains and not life.works))
    look.life = replace(life, stands=stands, excused=life.excused - {key}, needs=needs)


# ---------------------------------------------------------------------- what is done


def _decide(
    look: _Look, rule: Rule, component: str, at: float, key: str, what: str, *, check: bool,
    obeyed: Action | None = None, count: int = 1,
) -> None:  # fmt: skip
    life, policy = look.life, look.policy
    earlier = [
        entry for entry in _of(life, rule, component)
        if entry.action is not Action.NOTHING and not entry.blamed and at - entry.last <= rule.within_s
        and (life.state not in HELD or life.out_at is None or entry.at < life.out_at)
    ]  # fmt: skip
    times = len(earlier) + 1
    action = rule.actions[min(times, len(rule.actions)) - 1]
    if obeyed is not None:
        action = max(obeyed, action if times > 1 else obeyed, key=lambda one: one.severity)
    if life.state is LifeState.PROBATION and action is Action.SUSPECT:
        action, what = Action.DIAGNOSE, f"{what} in probation"
    if action.takes_out and rule.of is not Class.APPLICATION and action is not Action.REPLACE:
        worn = _worn_out(life, policy, look.now)
        action, what = (Action.REPLACE, f"{what}; {worn}") if worn else (action, what)
    going = life.pressing[0].action.severity if life.pressing and life.state in HELD else 0
    if action is Action.NOTHING or action.severity <= going:
        return  # it is on its way out for something as bad: one event, seen from several sides
    look.found.append(
        Found(
            node=life.node,
            rule=rule,
            component=component,
            action=action,
            times=times,
            at=at,
            key=key,
            check=check,
            what=what,
            count=count,
        )
    )


def _worn_out(life: Life, policy: TriagePolicy, now: float) -> str:
    rule = policy.lemon
    done = li.repairs_within(life, now, rule.repairs_s)
    if done >= rule.repairs_max:
        return f"{done} repairs in {rule.repairs_s / 86_400:g} days did not last"
    score = li.lemon(life.entries, now, rule)
    if score >= rule.replace_at:
        return f"it has had so much of late that it counts as a lemon (score {score:.1f})"
    return ""


def _of(life: Life, rule: Rule, component: str) -> list[Entry]:
    """Earlier ones of the same. A GPU that is known by its index only may be any of them."""
    return [
        entry
        for entry in life.entries
        if entry.rule == rule.name
        and (entry.component == component or component.isdecimal() or entry.component.isdecimal())
    ]


def _gist(life: Life) -> object:
    """What must not be forgotten by a restart in the next moment. That a burst goes on may be."""
    return life.epoch, life.stands, life.needs, life.excused


def _named(fault: Counted) -> str:
    if fault.kind in BY_NUMBER:
        return f"{fault.kind.upper()} {fault.code}"
    return fault.kind.replace("_", " ")


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
