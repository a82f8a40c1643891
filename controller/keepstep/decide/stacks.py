"""Stacks of many ranks, grouped so that the odd ones stand out.

Ranks that stand at the same place of the same functions form a group; the largest one is what the gang does,
the smallest ones are what somebody should read. Two stacks count as the same when their functions are, from
the innermost outwards: line numbers of a busy loop differ from one look to the next.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from keepstep.core.ids import Rank
from keepstep.decide.view import Finding

_DEPTH = 12  # innermost frames that are compared
_SHOWN = 6  # and shown of each group


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Ranks with the same stack."""

    ranks: tuple[Rank, ...]
    stack: tuple[str, ...]  # of the first of them, innermost first
    interpreter: str = ""


def grouped(findings: Iterable[Finding]) -> tuple[Standing, ...]:
    """Odd ones first: the fewest ranks, then the lowest."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        if finding.stack or finding.interpreter == "stuck":
            key = (finding.interpreter, *map(_function, finding.stack[:_DEPTH]))
            groups.setdefault(key, []).append(finding)
    found = [
        Standing(
            ranks=tuple(sorted(one.rank for one in same)),
            stack=min(same, key=lambda one: one.rank).stack,
            interpreter=same[0].interpreter,
        )
        for same in groups.values()
    ]
    return tuple(sorted(found, key=lambda group: (len(group.ranks), group.ranks)))


def told(findings: Iterable[Finding], culprit: Rank | None = None) -> tuple[str, ...]:
    """Lines for people: the culprit's stack, then those of the others, the odd ones first."""
    groups = sorted(grouped(findings), key=lambda group: culprit not in group.ranks)
    lines: list[str] = []
    for group in groups[:4]:
        held = "; the interpreter's lock is held" if group.interpreter == "stuck" else ""
        lines.append(f"{ranks_of(group.ranks)}{held}:")
        lines += [f"  {frame}" for frame in group.stack[:_SHOWN]]
    if len(groups) > 4:
        lines.append(f"{len(groups) - 4} more groups of stacks")
    return tuple(lines)


def ranks_of(ranks: tuple[Rank, ...]) -> str:
    """As people write it: rank 3, ranks 0-2, 5."""
    runs: list[list[Rank]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(words)


def _function(frame: str) -> str:
    """Without its line: of train.py:31 backward that is train.py backward."""
    place, _, function = frame.partition(" ")
    return f"{place.rpartition(':')[0] or place} {function}"
