"""Which placement groups and agents there should be: a pure function of what jobs want and what Ray says.

A job's gang is one group; `extra` groups have one bundle each: its spares, and a substitute for every bundle
of the gang that stands on a node which is cordoned or will go. Bundles of dead nodes are placed again by Ray
itself, and what comes of that is used as it comes. A bundle takes a whole node: as much of the pool's
resource as the smallest node has that is large enough.

Names say everything: keepstep/<owner>/<job>/<gang or extra>-<number>, and for an agent's actor the bundle and
Ray's node behind it. A group that waits is asked for anew, under the next number, when other nodes are to be
avoided than before.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from keepstep.core.ids import JobId, Node
from keepstep.decide.place import matches
from keepstep.decide.view import RESERVED_FOR
from keepstep.pools.pool import Want
from keepstep.pools.ray.words import Group, RayNode, Seen, WantedAgent, WantedGroup

NODE_ID = "ray.io/node-id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What of the cluster the pool may use."""

    owner: str
    resource: str = "GPU"  # whose amount on a node is its number of slots
    labels: Mapping[str, str]  # of nodes, as Ray's label selectors have them

    @property
    def prefix(self) -> str:
        return f"keepstep/{self.owner}/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    groups: tuple[WantedGroup, ...]
    agents: tuple[WantedAgent, ...]  # without endpoint
    waits: Mapping[JobId, str]


def usable(terms: Terms, seen: Seen, labels: Mapping[str, str] = {}) -> tuple[RayNode, ...]:
    """Living nodes that the pool may use at all, and a job that asks for labels."""
    return tuple(
        node
        for node in seen.nodes
        if node.alive
        and node.total.get(terms.resource, 0) >= 1
        and all(
            matches(node.labels.get(key), value) for key, value in (*terms.labels.items(), *labels.items())
        )
    )


def names(nodes: Iterable[RayNode]) -> dict[str, Node]:
    """keepstep's names by Ray's ids: Ray's own name of a node where no other living one has it."""
    nodes = sorted(nodes, key=lambda node: node.id)
    often = [node.name for node in nodes]
    return {
        node.id: Node(node.name if often.count(node.name) == 1 else f"{node.name}-{node.id[:8]}")
        for node in nodes
    }


def avoided(terms: Terms, seen: Seen, cordoned: Set[Node]) -> frozenset[str]:
    """Nodes that get nothing new: cordoned ones, and those that will go."""
    nodes = usable(terms, seen)
    called = names(nodes)
    return frozenset(node.id for node in nodes if called[node.id] in cordoned or node.draining)


def shape(
    terms: Terms,
    wants: Iterable[Want],
    seen: Seen,
    cordoned: Set[Node],
    asked: Mapping[str, Mapping[str, str]],
) -> Shape:
    """`asked`: the selectors with which groups that still wait were asked for."""
    groups: list[WantedGroup] = []
    agents: list[WantedAgent] = []
    waits: dict[JobId, str] = {}
    for want in wants:
        mine = _Job(terms=terms, want=want, seen=seen, avoid=avoided(terms, seen, cordoned), asked=asked)
        chosen = mine.groups()
        groups += chosen
        agents += mine.agents(chosen)
        why = mine.lacking(chosen, cordoned)
        if why:
            waits[want.job] = why
    return Shape(groups=tuple(groups), agents=tuple(agents), waits=waits)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    terms: Terms
    want: Want
    seen: Seen
    avoid: frozenset[str]
    asked: Mapping[str, Mapping[str, str]]

    def groups(self) -> list[WantedGroup]:
        gang = self._gang()
        there = self._placed(gang.name)
        if there is None:
            return [gang]  # substitutes and spares come after what cannot do without the others
        bad = sum(node in self.avoid for node in there)
        extras = sorted(self._found("extra"), key=self._worth)
        count = self.want.spares + bad
        kept = [group for group in extras if self._worth(group) < _WORTHLESS][:count]
        apart = frozenset(there)
        chosen = [self._again(group, "extra", 1, apart) for group in kept]
        fresh = self._next("extra", extras)
        chosen += [self._new(f"extra-{fresh + k}", 1, apart) for k in range(count - len(kept))]
        return [gang, *chosen]

    def agents(self, groups: Iterable[WantedGroup]) -> list[WantedAgent]:
        found = {group.name: group for group in self.seen.groups}
        alive = {node.id: node for node in self.seen.nodes if node.alive}
        called = names(usable(self.terms, self.seen))
        agents = []
        for group in groups:
            for index, node in enumerate(found[group.name].nodes if group.name in found else ()):
                if node in alive and node in called:
                    agents.append(self._agent(group, index, alive[node], called[node]))
        return agents

    def lacking(self, groups: Iterable[WantedGroup], cordoned: Set[Node]) -> str:
        """Why the gang is not placed: what is asked for, what there is, what would fit."""
        gang = next(iter(groups))
        if self._placed(gang.name) is not None:
            return ""
        size = gang.resources[self.terms.resource]
        nodes = usable(self.terms, self.seen, self.want.labels)
        called = names(nodes)
        fits, others = [], []
        for node in sorted(nodes, key=lambda node: called[node.id]):
            why = self._unfit(node, called[node.id], size, cordoned)
            if why:
                others.append(f"{called[node.id]} {why}")
            else:
                fits.append(called[node.id])
        what = f"{size:g} {self.terms.resource}"
        parts = [f"Ray is asked for {self.want.nodes} whole nodes with {what} each"]
        where = "".join(f", {key}={value}" for key, value in self._labels().items())
        parts.append(f"{len(fits)} of {len(nodes)} nodes can be had{where}" + _listed(fits))
        parts += others[:_LISTED_MAX]
        if len(others) > _LISTED_MAX:
            parts.append(f"and {len(others) - _LISTED_MAX} more")
        if fits and len(fits) < self.want.nodes:
            parts.append(f"resources.nodes up to {len(fits)} would fit now")
        return "; ".join(parts)

    def _unfit(self, node: RayNode, name: Node, size: float, cordoned: Set[Node]) -> str:
        if name in cordoned:
            return "is cordoned"
        if node.draining:
            return "is being drained"
        if node.total.get(self.terms.resource, 0) < size:
            return f"has {node.total.get(self.terms.resource, 0):g}"
        free = node.available.get(self.terms.resource, 0)
        return f"has {free:g} free: it is in use" if free < size else ""

    def _gang(self) -> WantedGroup:
        found = sorted(self._found("gang"), key=lambda group: ("" in group.nodes, group.name))
        if not found:
            return self._new("gang-1", self.want.nodes)
        return self._again(found[0], "gang", self.want.nodes)

    def _again(
        self, group: Group, kind: str, bundles: int, apart: frozenset[str] = frozenset()
    ) -> WantedGroup:
        """A group that is there; one that waits with another selector is asked for under the next number."""
        selector = self._selector(apart)
        if group.state == "PENDING" and self.asked.get(group.name, selector) != selector:
            return self._new(f"{kind}-{self._next(kind, [group])}", bundles, apart)
        resources = group.resources or self._size()
        return WantedGroup(name=group.name, bundles=len(group.nodes), resources=resources, selector=selector)

    def _new(self, name: str, bundles: int, apart: frozenset[str] = frozenset()) -> WantedGroup:
        name = f"{self.terms.prefix}{self.want.job}/{name}"
        return WantedGroup(name=name, bundles=bundles, resources=self._size(), selector=self._selector(apart))

    def _selector(self, apart: frozenset[str]) -> dict[str, str]:
        away = sorted(self.avoid | (apart - {""}))
        selector = self._labels()
        if away:
            selector[NODE_ID] = f"!in({','.join(away)})"
        return selector

    def _size(self) -> dict[str, float]:
        nodes = usable(self.terms, self.seen, self.want.labels)
        amounts = [node.total[self.terms.resource] for node in nodes]
        enough = [amount for amount in amounts if amount >= self.want.slots]
        return {self.terms.resource: float(min(enough, default=self.want.slots))}

    def _labels(self) -> dict[str, str]:
        return {**self.terms.labels, **self.want.labels}

    def _found(self, kind: str) -> list[Group]:
        start = f"{self.terms.prefix}{self.want.job}/{kind}-"
        return [group for group in self.seen.groups if group.name.startswith(start)]

    def _placed(self, name: str) -> tuple[str, ...] | None:
        """Where a group's bundles stand once all of them were placed; Ray moves single ones after that."""
        group = next((group for group in self.seen.groups if group.name == name), None)
        return None if group is None or group.state == "PENDING" else group.nodes

    def _worth(self, group: Group) -> int:
        """The order in which extras are kept."""
        called = names(usable(self.terms, self.seen))
        node = group.nodes[0]
        if called.get(node) in self.want.using:
            return 0
        if node in self.avoid:
            return _WORTHLESS
        return 1 if node in called else 2

    @staticmethod
    def _next(kind: str, groups: Iterable[Group]) -> int:
        numbers = [int(group.name.rpartition("-")[2]) for group in groups]
        return max(numbers, default=0) + 1

    def _agent(self, group: WantedGroup, index: int, node: RayNode, name: Node) -> WantedAgent:
        slots = int(node.total[self.terms.resource])
        labels = {RESERVED_FOR: self.want.job, "ray.node": node.id, **node.labels}
        arguments = ["--slots", str(min(slots, int(group.resources[self.terms.resource])))]
        arguments += ["--address", node.address] if node.address else []
        for key, value in sorted(labels.items()):
            arguments += ["--label", f"{key}={value}"]
        return WantedAgent(
            actor=f"{group.name}/{index}@{node.id[:16]}", group=group.name, bundle=index, ray_node=node.id,
            resources=group.resources, node=name, folder="", arguments=tuple(arguments),
        )  # fmt: skip


_WORTHLESS = 9
_LISTED_MAX = 6


def _listed(found: list[Node]) -> str:
    return f" ({', '.join(found[:_LISTED_MAX])})" if found else ""
