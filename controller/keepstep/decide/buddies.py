"""Who keeps copies of whose snapshots: for each node of a gang another one, each for one other.

Idle spares first: what is lost with a node of the gang is not lost with them, and their processors have
nothing better to do. A spare goes to a node whose buddy among the gang would share its replica, then to the
others in their order. Where spares do not suffice, a node of another replica where there is one: what takes a
replica away takes no copy of it along. All nodes look the same number of places further, so that none keeps
copies for two.
"""

from collections.abc import Mapping, Sequence

from keepstep.core.ids import Node
from keepstep.core.layout import Layout, local_ranks


def buddies(nodes: Sequence[Node], layout: Layout, spares: Sequence[Node] = ()) -> Mapping[Node, Node]:
    """The buddy of each node that has one; a gang on one node without a spare has none.

    `spares`: those that can be reached.
    """
    count = len(nodes)
    replicas = [
        {layout.coordinates(rank).dp for rank in local_ranks(layout.world_size, count, k)}
        for k in range(count)
    ]

    def apart(k: int, shift: int) -> bool:
        return replicas[k].isdisjoint(replicas[(k + shift) % count])

    def served(shift: int) -> tuple[int, int]:
        return sum(apart(k, shift) for k in range(count)), -shift

    shift = max(range(1, count), key=served, default=0)
    found = {node: nodes[(k + shift) % count] for k, node in enumerate(nodes) if shift}
    needy = sorted(range(count), key=lambda k: bool(shift) and apart(k, shift))
    return {**found, **{nodes[k]: spare for k, spare in zip(needy, spares, strict=False)}}
