"""Which link holds a gang up or is cut, from what the kernels at both of its ends say of the connections.

A link is a pair of nodes: their ranks' connections with each other, both directions together. It is

    slow   its round trip stands out: several times that of the other links, or, where there are no others,
           several times what it was itself; or much of what is sent over it has to be sent again
    cut    what is sent over it is sent again and again, and nothing comes back

Where every such link has one node in common, and there are several, it is that node's. Of a single link
nobody knows which end it is; links that failed before may tell.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from keepstep.core.ids import Node, Rank
from keepstep.decide.place import listed
from keepstep.decide.view import Failure, Finding

CUT = "hung: link"  # how signatures of cut links begin; the names of the nodes follow
_TIMES, _LATER_S, _RESENT = 5.0, 0.001, 0.05
_UNANSWERED_S = 1.0  # the kernel has sent several times by then


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What is known of one pair of nodes."""

    nodes: tuple[Node, Node]
    rtt_s: float
    least_s: float
    unanswered_s: float
    resent: float

    def __str__(self) -> str:
        return f"{self.nodes[0]} and {self.nodes[1]}"


def links(findings: Iterable[Finding], nodes: Mapping[Rank, Node]) -> tuple[Link, ...]:
    """Every pair of nodes whose ranks have connections, by name."""
    told = [(nodes[one.rank], link) for one in findings if one.rank in nodes for link in one.links]
    at = {link.local: node for node, link in told}
    pairs: dict[tuple[Node, Node], list[Link]] = {}
    for node, link in told:
        other = at.get(link.peer)
        if other is None or other == node:
            continue
        pair = (min(node, other), max(node, other))
        pairs.setdefault(pair, []).append(
            Link(
                nodes=pair,
                rtt_s=link.rtt_s,
                least_s=link.rtt_least_s,
                unanswered_s=link.unanswered_s,
                resent=link.resent,
            )
        )
    return tuple(_together(pair, several) for pair, several in sorted(pairs.items()))


def slow_ones(every: Sequence[Link]) -> tuple[Link, ...]:
    """Those that stand out, the slowest first."""
    found = []
    for one in every:
        others = [each.rtt_s for each in every if each is not one and each.rtt_s > 0]
        usual_s = statistics.median(others) if others else one.least_s
        late = one.rtt_s > _TIMES * usual_s and one.rtt_s - usual_s > _LATER_S
        lossy = one.resent > max(_RESENT, _TIMES * statistics.median([each.resent for each in every]))
        if late or lossy or one.unanswered_s >= _UNANSWERED_S:
            found.append(one)
    return tuple(sorted(found, key=lambda one: (-one.rtt_s, one.nodes)))


def cut_ones(every: Iterable[Link]) -> tuple[Link, ...]:
    return tuple(one for one in every if one.unanswered_s >= _UNANSWERED_S)


def in_common(bad: Sequence[Link]) -> Node | None:
    """The one node that all of several bad links have."""
    shared = set.intersection(*(set(one.nodes) for one in bad)) if len(bad) > 1 else set()
    return next(iter(shared)) if len(shared) == 1 else None


def likeliest(bad: Sequence[Link], order: Sequence[Node], failures: Iterable[Failure]) -> Node:
    """The end that most bad links share, earlier failures counted; then the later one in the gang."""
    seen: Counter[str] = Counter(name for one in bad for name in one.nodes)
    for failure in failures:
        if failure.signature.startswith(CUT):
            seen.update(failure.signature.removeprefix(CUT).split())
    ends = {name for one in bad for name in one.nodes}
    return max(ends, key=lambda name: (seen[name], order.index(name) if name in order else -1, name))


def told(bad: Sequence[Link]) -> str:
    return listed([f"{one} ({_how(one)})" for one in bad[:4]])


def _how(one: Link) -> str:
    if one.unanswered_s >= _UNANSWERED_S:
        return f"nothing has come back for {one.unanswered_s:.0f} s"
    again = f", {one.resent:.0%} sent again" if one.resent > _RESENT else ""
    return f"{one.rtt_s * 1e3:.3g} ms for a round trip, {one.least_s * 1e3:.2g} ms at its best{again}"


def _together(pair: tuple[Node, Node], several: Sequence[Link]) -> Link:
    return Link(
        nodes=pair,
        rtt_s=max(one.rtt_s for one in several),
        least_s=min((one.least_s for one in several if one.least_s > 0), default=0.0),
        unanswered_s=max(one.unanswered_s for one in several),
        resent=max(one.resent for one in several),
    )
