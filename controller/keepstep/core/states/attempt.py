"""The life of one attempt: a launch of the whole gang, fenced by its number."""

from enum import StrEnum

from keepstep.core.states.table import Table, rows


class AttemptState(StrEnum):
    PREPARING = "preparing"  # code, standby servers and the rendezvous store are made ready on every node
    STARTING = "starting"  # every node was told to go; no step yet
    RUNNING = "running"
    ENDING = "ending"  # its ranks are being ended; nothing may start before they are dead
    ENDED = "ended"


class AttemptEvent(StrEnum):
    GO = "go"
    STEP = "step"
    END = "end"
    DEAD = "dead"  # confirmed, fenced, or the lease ran out
    COMPLETE = "complete"


_A, _E = AttemptState, AttemptEvent

ATTEMPT = Table(
    noun="attempt",
    first=_A.PREPARING,
    rows=rows(
        (_A.PREPARING, _E.GO, _A.STARTING),
        (_A.STARTING, _E.STEP, _A.RUNNING),
        ((_A.PREPARING, _A.STARTING, _A.RUNNING), _E.END, _A.ENDING),
        ((_A.STARTING, _A.RUNNING, _A.ENDING), _E.COMPLETE, _A.ENDED),
        (_A.ENDING, _E.DEAD, _A.ENDED),
    ),
)
