"""Who answers for what a machine shows: its agents read one kernel's log, and may see all of its GPUs.

Each physical event is one node's: of the node that has the GPU, else of the first node of the machine by its
name. The others count it, so that none of them acts upon it later, either.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from keepstep.core.ids import Node
from keepstep.decide.place import natural
from keepstep.decide.triage import Report

_OWN = ("storage.", "network.buddy_unreachable")  # of the agent's own job, not of its machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A node on a machine, and what it calls its GPUs."""

    node: Node
    gpus: frozenset[str] = frozenset()


def shared(seats: Iterable[Seat]) -> tuple[Seat, ...]:
    """In the order in which they answer."""
    return tuple(sorted(seats, key=lambda seat: natural(seat.node)))


def own_share(report: Report, node: Node, seats: Sequence[Seat]) -> Report:
    """What `node` has to answer for, where `seats` are all nodes of its machine, in their order."""
    if len(seats) < 2:
        return report
    return replace(
        report,
        checks=tuple(
            check
            for check in report.checks
            if check.name.startswith(_OWN) or _answers(check.component, seats) == node
        ),
        faults=tuple(
            replace(fault, elsewhere=_answers(fault.component, seats) != node) for fault in report.faults
        ),
        boot_elsewhere=seats[0].node != node,
    )


def _answers(component: str, seats: Sequence[Seat]) -> Node:
    return next((seat.node for seat in seats if component in seat.gpus), seats[0].node)
