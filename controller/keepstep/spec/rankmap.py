"""Who sits where: every rank with its coordinates, its node and its place on it."""

from collections.abc import Sequence

from keepstep.core.job import JobSpec
from keepstep.core.layout import local_ranks
from keepstep.spec.problems import counted

_MOST_ROWS = 512


def rank_map(
    spec: JobSpec, nodes: Sequence[str] = (), *, dp: int | None = None, most_rows: int = _MOST_ROWS
) -> str:
    """A table for people, one row for each rank; without names, nodes are called node 0, node 1, ...

    `dp` is for a job that runs with fewer replicas. Of a large job the first and the last rows are shown.
    """
    layout = spec.parallelism if dp is None else spec.parallelism.with_replicas(dp)
    count = len(nodes) or spec.nodes_for(layout.dp)
    world = layout.world_size
    assert world % count == 0, f"{world} ranks on {count} nodes"
    names = nodes or [f"node {index}" for index in range(count)]
    per_node = len(local_ranks(world, count, 0))
    dimensions = ["tp", *(["cp"] if layout.cp > 1 else []), "pp", "dp"]
    shown = (
        range(world)
        if world <= most_rows
        else [*range(most_rows // 2), *range(world - most_rows // 2, world)]
    )
    rows = [["rank", *dimensions, "node", "slot"]]
    for rank in shown:
        at = layout.coordinates(rank)
        node, slot = divmod(rank, per_node)
        rows.append([str(rank), *(str(getattr(at, name)) for name in dimensions), names[node], str(slot)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line(row, widths, left=len(dimensions) + 1) for row in rows]
    if world > len(shown):
        lines.insert(1 + most_rows // 2, f"... {world - len(shown):,} more ...")
    head = f"{layout} = {counted(world, 'rank')} on {counted(count, 'node')}, {per_node} on each"
    return "\n".join([head, *lines])


def _line(row: Sequence[str], widths: Sequence[int], *, left: int) -> str:
    """Numbers to the right, the node's name (column `left`) to the left."""
    cells = [
        cell.ljust(width) if column == left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
