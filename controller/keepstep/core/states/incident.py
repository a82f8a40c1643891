"""The life of an incident: one cause, from the first evidence to the next completed step."""

from enum import StrEnum

from keepstep.core.states.table import Table, rows


class IncidentState(StrEnum):
    OPEN = "open"  # noticed; its ranks are being ended or evidence is collected
    RECOVERING = "recovering"  # the next rung is decided and under way
    RECOVERED = "recovered"  # the gang stepped again
    WAITING = "waiting"  # nothing can be done now: queued for nodes or for its back-off
    CLOSED = "closed"  # over without a recovery: the job ended


class IncidentEvent(StrEnum):
    DECIDE = "decide"
    WAIT = "wait"
    WORSEN = "worsen"  # something else failed before it was over
    STEP = "step"
    CLOSE = "close"


_I, _E = IncidentState, IncidentEvent

INCIDENT = Table(
    noun="incident",
    first=_I.OPEN,
    rows=rows(
        ((_I.OPEN, _I.WAITING), _E.DECIDE, _I.RECOVERING),
        (_I.OPEN, _E.WAIT, _I.WAITING),
        (_I.RECOVERING, _E.WORSEN, _I.OPEN),
        (_I.RECOVERING, _E.STEP, _I.RECOVERED),
        ((_I.OPEN, _I.RECOVERING, _I.WAITING), _E.CLOSE, _I.CLOSED),
    ),
)
