"""Whose fault it is when several show the same at nearly the same time.

One fault on several GPUs or nodes of one job within two minutes is the job; on several nodes of a rack, the
rack. What was decided about the nodes before that was known is taken back, as far as they have not left
service yet. A blamed check that still stands when the others' are over was the node's own after all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from keepstep.core.ids import JobId, Node
from keepstep.core.rules import Class, Correlation, Rule
from keepstep.decide.life import Life


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """One finding, as others may be compared with it."""

    at: float
    node: Node
    component: str
    rule: str
    job: JobId | None = None
    rack: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    label: str  # "job:ID" or "rack:NAME"
    reason: str
    nodes: frozenset[Node]  # that showed it, the newest included


def blame(new: Sighting, rule: Rule, recent: Iterable[Sighting], bounds: Correlation) -> Blame | None:
    """`recent`: earlier sightings; those of this rule and this while count."""
    close = [one for one in recent if one.rule == new.rule and abs(new.at - one.at) <= bounds.within_s]
    if new.job is not None:
        mine = [one for one in close if one.job == new.job] + [new]
        application = rule.of is Class.APPLICATION
        parts = {(one.node, one.component if application else "") for one in mine}
        if len(parts) >= (bounds.job_gpus if application else bounds.job_nodes):
            nodes = frozenset(one.node for one in mine)
            what = f"{len(parts)} {'GPUs' if application else 'nodes'} of {new.job}"
            return _blame(f"job:{new.job}", what, rule, "the job", nodes, bounds)
    if new.rack:
        nodes = frozenset(one.node for one in close if one.rack == new.rack) | {new.node}
        if len(nodes) >= bounds.rack_nodes:
            what = f"{len(nodes)} nodes of rack {new.rack}"
            return _blame(f"rack:{new.rack}", what, rule, "the rack", nodes, bounds)
    return None


def _blame(
    label: str, what: str, rule: Rule, whose: str, nodes: frozenset[Node], bounds: Correlation
) -> Blame:
    reason = f"{what} show the same within {bounds.within_s:g} s ({rule.name}): {whose}, not its nodes"
    if whose == "the job":
        reason = f"{what} show the same within {bounds.within_s:g} s ({rule.name}): the job, not its hardware"
    return Blame(label=label, reason=reason, nodes=nodes)


def taken_back(life: Life, rule: str, label: str, since: float) -> Life:
    """A node's entries and needs of the last while, now that it is known whose fault they were."""
    entries = tuple(
        replace(entry, blamed=label)
        if entry.rule == rule and entry.last >= since and not entry.blamed
        else entry
        for entry in life.entries
    )
    needs = tuple(
        replace(need, blamed=label) if need.rule == rule and need.at >= since and not need.blamed else need
        for need in life.needs
    )
    return replace(life, entries=entries, needs=tuple(n for n in needs if n.check or not n.blamed))


def left_over(lives: Iterable[Life], bounds: Correlation, now: float) -> Mapping[Node, Life]:
    """Nodes whose blamed check still stands while too few others' do: it is their own."""
    standing: dict[tuple[str, str], list[Life]] = {}
    for life in lives:
        for need in life.needs:
            if need.blamed and now - need.at > bounds.within_s:
                standing.setdefault((need.blamed, need.rule), []).append(life)
    changed: dict[Node, Life] = {}
    for (label, rule), those in standing.items():
        most = min(bounds.job_nodes, bounds.rack_nodes) if label.startswith("job:") else bounds.rack_nodes
        if len({life.node for life in those}) >= most:
            continue
        for life in those:
            before = changed.get(life.node, life)
            needs = tuple(
                replace(need, blamed="", alone=True, at=now)
                if (need.blamed, need.rule) == (label, rule)
                else need
                for need in before.needs
            )
            changed[life.node] = replace(before, needs=needs)
    return changed
