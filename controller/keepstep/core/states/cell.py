"""The life of a cell: the smallest set of ranks that is stopped and started together.

Today a cell is the whole gang, so its incarnation follows the attempt; where a trainer goes on without a
data-parallel replica, a cell is a replica and heals while the others train.
"""

from enum import StrEnum

from keepstep.core.states.table import Table, rows


class CellState(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDING = "ending"
    DEAD = "dead"


class CellEvent(StrEnum):
    START = "start"
    END = "end"
    DIE = "die"  # no descendant is left
    HEAL = "heal"  # the next incarnation waits


_C, _E = CellState, CellEvent

CELL = Table(
    noun="cell",
    first=_C.WAITING,
    rows=rows(
        (_C.WAITING, _E.START, _C.RUNNING),
        ((_C.WAITING, _C.RUNNING), _E.END, _C.ENDING),
        ((_C.RUNNING, _C.ENDING), _E.DIE, _C.DEAD),
        (_C.DEAD, _E.HEAL, _C.WAITING),
    ),
)
