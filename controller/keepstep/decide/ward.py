"""The health of a whole fleet, looked at once: reports in, changed lives and what is to be told out.

`look` changes nothing: what it returns is written down first and then taken over by `take`, so that a
controller that dies between the two looks at the same things again. Nodes about which there is nothing to
decide cost nothing; a fleet of thousands is mostly such nodes.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from keepstep.core.ids import JobId, Node
from keepstep.core.rules import TriagePolicy
from keepstep.decide.breaker import Room, Sizes
from keepstep.decide.correlate import Sighting, blame, left_over, taken_back
from keepstep.decide.life import Life
from keepstep.decide.lifecycle import Situation, advance
from keepstep.decide.triage import Found, Report, needed, triage

_RECENT_MAX = 20_000
_SAY_AGAIN_S = 600.0
_PAST_TOLD = 5

Where = Callable[[Node], Situation]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A line for the timeline."""

    kind: str
    text: str
    node: Node | None = None
    job: JobId | None = None
    rule: str = ""
    action: str = ""


@dataclass(slots=True, kw_only=True)
class Looked:
    lives: dict[Node, Life] = field(default_factory=dict)  # changed ones
    streaks: dict[Node, Mapping[str, int]] = field(default_factory=dict)
    told: list[Told] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)
    said: dict[str, float] = field(default_factory=dict)
    urgent: set[Node] = field(default_factory=set)  # must be stored before anything is done about them
    moved: bool = False  # some life made a step: another look may bring the next one


@dataclass(slots=True, kw_only=True)
class Ward:
    policy: TriagePolicy
    lives: dict[Node, Life] = field(default_factory=dict)
    streaks: dict[Node, Mapping[str, int]] = field(default_factory=dict)
    recent: deque[Sighting] = field(default_factory=lambda: deque(maxlen=_RECENT_MAX))
    busy: set[Node] = field(default_factory=set)  # whose lives are not plain, or left service lately
    said: dict[str, float] = field(default_factory=dict)

    @classmethod
    def remembered(cls, policy: TriagePolicy, lives: Iterable[Life], now: float) -> "Ward":
        """As it was left by the controller before."""
        ward = cls(policy=policy, lives={life.node: life for life in lives})
        for life in ward.lives.values():
            ward._file(life, now)
            ward.recent.extend(
                Sighting(
                    at=entry.at, node=life.node, component=entry.component, rule=entry.rule, job=entry.job,
                    rack=entry.rack,
                )
                for entry in life.entries
                if now - entry.at <= policy.correlation.within_s
            )  # fmt: skip
        return ward

    def life(self, node: Node) -> Life:
        return self.lives.get(node) or Life(node=node)

    def look(
        self,
        reports: Mapping[Node, Report],
        where: Where,
        sizes: Sizes,
        now: float,
        going: Collection[Node] = (),
    ) -> Looked:
        """`going`: nodes that their pool will take away."""
        looked = Looked()
        for node, report in reports.items():
            self._report(looked, node, report, where(node), now)
        if self.busy or looked.lives or going:
            self._advance(looked, where, sizes, now, going)
        return looked

    def take(self, looked: Looked, now: float) -> None:
        """Take over what was looked at, once it is written down."""
        for node, streaks in looked.streaks.items():
            if streaks:
                self.streaks[node] = streaks
            else:
                self.streaks.pop(node, None)
        for life in looked.lives.values():
            self.lives[life.node] = life
            self._file(life, now)
        self.recent.extend(looked.sightings)
        self.said |= looked.said
        while self.recent and now - self.recent[0].at > 2 * self.policy.correlation.within_s:
            self.recent.popleft()
        if looked.said:
            self.said = {what: at for what, at in self.said.items() if now - at <= _SAY_AGAIN_S}

    def _file(self, life: Life, now: float) -> None:
        lately = life.out_at is not None and now - life.out_at <= self.policy.bounds.soon_s
        if life.plain and not lately:
            self.busy.discard(life.node)
        else:
            self.busy.add(life.node)

    # ------------------------------------------------------------ reports

    def _report(self, looked: Looked, node: Node, report: Report, at: Situation, now: float) -> None:
        before = self.life(node)
        seen = triage(before, report, self.streaks.get(node, {}), self.policy, now)
        looked.streaks[node] = seen.streaks
        life = seen.life
        if life is not before:
            looked.lives[node] = life
        if seen.urgent:
            looked.urgent.add(node)
        for found in seen.found:
            self._found(looked, found, at, now)
        if seen.past:
            more = f" and {len(seen.past) - _PAST_TOLD} more" if len(seen.past) > _PAST_TOLD else ""
            text = f"from before it was watched, not acted upon: {'; '.join(seen.past[:_PAST_TOLD])}{more}"
            looked.told.append(Told(kind="node past", text=text, node=node))

    def _found(self, looked: Looked, found: Found, at: Situation, now: float) -> None:
        bounds = self.policy.correlation
        sighting = Sighting(
            at=found.at,
            node=found.node,
            component=found.component,
            rule=found.rule.name,
            job=at.job,
            rack=at.rack,
        )
        blamed = blame(sighting, found.rule, (*self.recent, *looked.sightings), bounds)
        looked.sightings.append(sighting)
        life = looked.lives.get(found.node) or self.life(found.node)
        label = blamed.label if blamed else ""
        looked.lives[found.node] = needed(life, found, blamed=label, job=at.job, rack=at.rack)
        told = Told(
            kind="node found", text=found.reason, node=found.node, job=at.job, rule=found.rule.name,
            action=str(found.action),
        )  # fmt: skip
        if blamed is None:
            looked.told.append(told)
            return
        for node in blamed.nodes - {found.node}:
            other = looked.lives.get(node) or self.life(node)
            changed = taken_back(other, found.rule.name, label, found.at - bounds.within_s)
            if changed != other:
                looked.lives[node] = changed
                looked.urgent.add(node)
        what = f"{label} {found.rule.name}"
        if now - {**self.said, **looked.said}.get(what, -_SAY_AGAIN_S) >= _SAY_AGAIN_S:
            looked.said[what] = now
            kind = "job to blame" if label.startswith("job:") else "rack to blame"
            looked.told.append(Told(kind=kind, text=blamed.reason, job=at.job, rule=found.rule.name))

    # ------------------------------------------------------------ lives

    def _advance(
        self, looked: Looked, where: Where, sizes: Sizes, now: float, going: Collection[Node]
    ) -> None:
        nodes = self.busy | set(looked.lives) | set(going)
        lives = [looked.lives.get(node) or self.life(node) for node in nodes]
        for node, changed in left_over(lives, self.policy.correlation, now).items():
            looked.lives[node] = changed
            looked.urgent.add(node)
        lives = [looked.lives.get(life.node, life) for life in lives]
        room = Room.counted(lives, self.policy.bounds, sizes, now)
        lives.sort(key=_urgency)
        for life in lives:
            if life.waits(now) and life.node not in looked.lives and life.node not in going:
                continue
            step = advance(life, where(life.node), self.policy, now, room)
            if step is None:
                continue
            if step.held:
                self._held(looked, life, step.told, now)
                continue
            looked.lives[life.node] = step.life
            looked.urgent.add(life.node)
            looked.moved = True
            kind = f"node {step.life.state}" if step.event is not None else "node"
            looked.told.append(Told(kind=kind, text=step.told, node=life.node, job=where(life.node).job))

    def _held(self, looked: Looked, life: Life, text: str, now: float) -> None:
        what = f"held {life.node}"
        if now - self.said.get(what, -_SAY_AGAIN_S) >= _SAY_AGAIN_S:
            looked.told.append(Told(kind="node held", text=text, node=life.node))
        looked.said[what] = now


def _urgency(life: Life) -> tuple[int, float, str]:
    """Who may go first where not all may: the most severe, then the longest known."""
    pressing = life.pressing
    severity = -pressing[0].action.severity if pressing else 0
    return severity, pressing[0].at if pressing else 0.0, life.node
