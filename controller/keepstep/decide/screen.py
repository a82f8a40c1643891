"""Which nodes and links of a pool are sick, found by pairs that work together.

A pair fails if either node is sick, or the link between them. All pairs of a round run at once. First
everybody is paired with a neighbour: who is in a pair that passes is good. Then whoever is not known to be
good is paired with one who is, each time with another one. Who passes is good, so what it failed with before,
if that is good too, was a sick link; who fails with two good partners is sick. Where few are sick, this
takes four rounds or so, however large the pool; there are never more than `rounds_max`.

Everything follows from what was tested, so a screening goes on wherever it was interrupted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SICK_AFTER = 2  # good partners that a node fails with; one of them may be a sick link


@dataclass(frozen=True, slots=True, order=True)
class Pair:
    """Two names in order, so that a pair is the same from both ends."""

    a: str
    b: str

    @classmethod
    def of(cls, a: str, b: str) -> "Pair":
        return cls(min(a, b), max(a, b))

    def other(self, node: str) -> str:
        return self.b if node == self.a else self.a


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    good: frozenset[str]
    sick: frozenset[str]
    links: frozenset[Pair]  # sick ones between good nodes
    open: frozenset[str]  # nodes of which it is not known


Round = dict[Pair, bool]  # whether it passed


def rounds_max(nodes: int) -> int:
    return 2 * max(1, (nodes - 1).bit_length()) + 2


def screened(nodes: Iterable[str], rounds: Sequence[Round]) -> Screened:
    """What is known after these rounds."""
    everybody = frozenset(nodes)
    tests = [(pair, passed) for one in rounds for pair, passed in one.items()]
    good = frozenset(node for pair, passed in tests if passed for node in (pair.a, pair.b))
    failed = {pair for pair, passed in tests if not passed}
    failures: dict[str, set[str]] = {node: set() for node in everybody - good}
    for pair in failed:
        for node, partner in ((pair.a, pair.b), (pair.b, pair.a)):
            if partner in good and node in failures:
                failures[node].add(partner)
    sick = frozenset(node for node, partners in failures.items() if len(partners) >= SICK_AFTER)
    links = frozenset(pair for pair in failed if pair.a in good and pair.b in good)
    return Screened(good=good & everybody, sick=sick, links=links, open=everybody - good - sick)


def next_round(nodes: Sequence[str], rounds: Sequence[Round]) -> tuple[Pair, ...]:
    """The pairs to try now, no node in two of them; none: nothing more can be found out."""
    if len(rounds) >= rounds_max(len(nodes)):
        return ()
    known = screened(nodes, rounds)
    tried = {pair for one in rounds for pair in one}
    free = [node for node in nodes if node in known.good]
    left: list[str] = []
    pairs: list[Pair] = []
    for node in nodes:
        if node not in known.open:
            continue
        partner = next((one for one in free if Pair.of(node, one) not in tried), None)
        if partner is None:
            left.append(node)
        else:
            free.remove(partner)
            pairs.append(Pair.of(node, partner))
    while left:
        node = left.pop(0)
        partner = next((one for one in left if Pair.of(node, one) not in tried), None)
        if partner is not None:
            left.remove(partner)
            pairs.append(Pair.of(node, partner))
    return tuple(pairs)


def told(nodes: Iterable[str], rounds: Sequence[Round], reasons: Mapping[Pair, str], node: str) -> str:
    """What a screening says of a node. `reasons`: of pairs that failed."""
    known = screened(nodes, rounds)
    mine = [(pair, passed) for one in rounds for pair, passed in one.items() if node in (pair.a, pair.b)]
    failed = [pair for pair, passed in mine if not passed]
    others = ", ".join(sorted(pair.other(node) for pair in failed))
    because = f" ({reasons[failed[-1]]})" if failed and failed[-1] in reasons else ""
    if node in known.sick:
        return f"fails with {others}{because}"
    links = sorted(pair.other(node) for pair in known.links if node in (pair.a, pair.b))
    if links:
        return f"its link to {', '.join(links)} is sick{because}"
    if node in known.good:
        return f"right, with {mine[-1][0].other(node)}"
    return f"fails with {others}{because}" if failed else "could not be tried"
