"""Who keeps copies of whose snapshots: for each node of a gang another one of it, each for one other.

A node of another replica where there is one: what takes a replica away takes no copy of it along. All nodes
look the same number of places further, so that none keeps copies for two.
"""

from collections.abc import Mapping, Sequence

from keepstep.core.ids import Node
from keepstep.core.layout import Layout, local_ranks


def buddies(nodes: Sequence[Node], layout: Layout) -> Mapping[Node, Node]:
    """The buddy of each node; nothing for a gang on one node: what is there is all there is."""
    count = len(nodes)
    replicas = [
        {layout.coordinates(rank).dp for rank in local_ranks(layout.world_size, count, k)}
        for k in range(count)
    ]
    if count < 2:
        return {}

    def apart(shift: int) -> int:
        return sum(replicas[k].isdisjoint(replicas[(k + shift) % count]) for k in range(count))

    shift = max(range(1, count), key=lambda shift: (apart(shift), -shift))
    return {node: nodes[(k + shift) % count] for k, node in enumerate(nodes)}
