"""What agents report of their nodes' health, between two looks: the newest of each, ready to be triaged."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from keepstep.control.fleet import Fleet, Member
from keepstep.core.ids import Node
from keepstep.core.states import NodeState
from keepstep.decide.machine import Seat, own_share, shared
from keepstep.decide.triage import Counted, Report, Standing
from keepstep.decide.ward import Ward
from keepstep.wire.health import HealthStatus

ATTACHED = "run"  # the pool of nodes that live as long as their terminal
_SILENT = Standing(name="node.silent", text="no word from its agent")
_GAP_S = 5.0
_SETTLES_S = 60.0  # an agent that has just started reads the kernel's log piece by piece
_THERE = (NodeState.READY, NodeState.SILENT)


@dataclass(slots=True)
class _Watched:
    until: float
    gap_from: float
    gap_to: float

    def hear(self, now: float) -> None:
        if now - self.until >= _GAP_S:
            self.gap_from, self.gap_to = self.until, now
        self.until = now

    def unwatched_s(self, now: float) -> float:
        return now - self.gap_from if now - self.gap_to <= _SETTLES_S else 0.0


class Reported:
    def __init__(self, watched_until: float = 0.0) -> None:
        """`watched_until`: by the controller before, in health time."""
        self.statuses: dict[Node, HealthStatus] = {}  # that wait to be looked at
        self._watched_until = watched_until
        self._seen: dict[Node, object] = {}
        self._watched: dict[Node, _Watched] = {}
        self._known: set[Node] = set()  # looked at by this controller

    def hear(self, member: Member, status: HealthStatus | None, ward: Ward, now: float) -> bool:
        """Keep the newest report. True if it should be looked at now."""
        node = member.name
        if status is None or member.pool == ATTACHED:
            return False
        life = ward.life(node)
        if node not in self._watched:
            before = self._watched_until if life.epoch else now
            self._watched[node] = _Watched(before, before, now)
        self._watched[node].hear(now)
        open_ = life.stands or life.excused or node in ward.streaks
        news = _gist(status) != self._seen.get(node)
        if not (status.checks or open_ or news) and node in self._known:
            return False
        self.statuses[node] = status
        return news

    def taken(self, fleet: Fleet, ward: Ward, now: float) -> dict[Node, Report]:
        """What there is to look at, silence included."""
        machines = _machines(fleet, ward) if self.statuses else {}
        reports = {}
        for node, status in self.statuses.items():
            epochs = {status.epoch, ward.life(node).epoch} - {""}
            seats = {seat for epoch in epochs for seat in machines.get(epoch, ())}
            reports[node] = own_share(self._report(node, status, now), node, shared(seats))
        talking = any(member.talks(fleet.time) for member in fleet.members.values())
        silent_s = ward.policy.deadlines.silent_s
        for member in fleet.members.values():
            if member.name in reports or member.pool == ATTACHED:
                continue
            quiet = member.state in (NodeState.SILENT, NodeState.LOST)
            if quiet and talking and fleet.time.age(member.heard_at) >= silent_s:
                reports[member.name] = Report(checks=(_SILENT,))
            elif _SILENT.key in ward.life(member.name).stands and member.talks(fleet.time):
                reports[member.name] = Report()
        return reports

    def looked_at(self, statuses: Mapping[Node, HealthStatus]) -> None:
        """They are written down. What came meanwhile waits on."""
        for node, status in statuses.items():
            self._known.add(node)
            self._seen[node] = _gist(status)
            if self.statuses.get(node) is status:
                del self.statuses[node]

    def _report(self, node: Node, status: HealthStatus, now: float) -> Report:
        indexes = {str(gpu.index): gpu.uuid for gpu in status.gpus}  # a GPU that never answered has no other
        return Report(
            epoch=status.epoch,
            checks=tuple(
                Standing(
                    name=c.name, component=indexes.get(c.component, c.component), level=c.level,
                    value=c.value, text=c.text, for_s=c.for_s,
                )
                for c in status.checks
            ),
            faults=tuple(
                Counted(
                    kind=f.kind, code=f.code, component=f.component, count=f.count, age_s=f.last_age_s,
                    text=f.text,
                )
                for f in status.faults
            ),
            first=node not in self._known,
            unwatched_s=self._watched[node].unwatched_s(now),
        )  # fmt: skip


def _gist(status: HealthStatus) -> object:
    return status.epoch, tuple((f.kind, f.code, f.component, f.count) for f in status.faults)


def _machines(fleet: Fleet, ward: Ward) -> Mapping[str, Iterable[Seat]]:
    """The nodes of each boot of each machine. One that is silent still answers for what it will tell."""
    found: dict[str, list[Seat]] = {}
    for member in fleet.members.values():
        if member.pool == ATTACHED or member.state not in _THERE:
            continue
        status = member.health
        epoch = status.epoch if status is not None else ward.life(member.name).epoch
        if epoch:
            found.setdefault(epoch, []).append(Seat(node=member.name, gpus=_gpus(member)))
    return found


def _gpus(member: Member) -> frozenset[str]:
    """By UUID and, as its agent may have been told of them, by index."""
    own = frozenset(member.register.gpus) if member.register is not None else frozenset[str]()
    samples = member.health.gpus if member.health is not None else ()
    return own | {gpu.uuid for gpu in samples if str(gpu.index) in own}
