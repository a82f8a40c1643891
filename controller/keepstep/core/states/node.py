"""The life of a node as the fleet sees it. Being cordoned is a mark beside it, not a state."""

from enum import StrEnum

from keepstep.core.states.table import Table, rows


class NodeState(StrEnum):
    READY = "ready"
    SILENT = "silent"  # no word for longer than its bound: silence is not failure
    LOST = "lost"  # positive evidence of death, or a person's word
    GONE = "gone"  # took its leave


class NodeEvent(StrEnum):
    REGISTER = "register"
    HEAR = "hear"
    MISS = "miss"
    CONFIRM = "confirm"  # the pool, a reset connection and failed reconnections, or a person
    LEAVE = "leave"


_N, _E = NodeState, NodeEvent

NODE = Table(
    noun="node",
    first=_N.READY,
    rows=rows(
        ((_N.READY, _N.SILENT, _N.LOST, _N.GONE), _E.REGISTER, _N.READY),
        ((_N.READY, _N.SILENT), _E.HEAR, _N.READY),
        (_N.READY, _E.MISS, _N.SILENT),
        ((_N.READY, _N.SILENT), _E.CONFIRM, _N.LOST),
        ((_N.READY, _N.SILENT), _E.LEAVE, _N.GONE),
    ),
)
