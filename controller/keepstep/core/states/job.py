"""The life of a job, from submission to its end. An accepted job is never forgotten."""

from enum import StrEnum

from keepstep.core.states.table import Table, rows


class JobState(StrEnum):
    QUEUED = "queued"  # waits for nodes or for its back-off
    STARTING = "starting"  # an attempt is placed and has not stepped yet
    RUNNING = "running"
    RECOVERING = "recovering"  # an attempt failed; its ranks are being ended, the next one is decided
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobEvent(StrEnum):
    PLACE = "place"
    STEP = "step"  # the gang completed a step in this attempt
    FAULT = "fault"  # the attempt is over or must end
    REQUEUE = "requeue"
    COMPLETE = "complete"  # every rank exited 0
    GIVE_UP = "give up"
    SUSPEND = "suspend"
    RESUME = "resume"
    CANCEL = "cancel"
    DEAD = "dead"  # nothing of the last attempt is left


_J, _E = JobState, JobEvent

JOB = Table(
    noun="job",
    first=_J.QUEUED,
    rows=rows(
        ((_J.QUEUED, _J.RECOVERING), _E.PLACE, _J.STARTING),
        (_J.STARTING, _E.STEP, _J.RUNNING),
        ((_J.STARTING, _J.RUNNING), _E.FAULT, _J.RECOVERING),
        (_J.RECOVERING, _E.REQUEUE, _J.QUEUED),
        ((_J.STARTING, _J.RUNNING), _E.COMPLETE, _J.SUCCEEDED),
        ((_J.QUEUED, _J.STARTING, _J.RUNNING, _J.RECOVERING), _E.GIVE_UP, _J.FAILED),
        ((_J.STARTING, _J.RUNNING, _J.RECOVERING), _E.SUSPEND, _J.SUSPENDING),
        (_J.QUEUED, _E.SUSPEND, _J.SUSPENDED),
        (_J.SUSPENDING, _E.DEAD, _J.SUSPENDED),
        (_J.SUSPENDING, _E.COMPLETE, _J.SUCCEEDED),
        (_J.SUSPENDED, _E.RESUME, _J.QUEUED),
        (
            (_J.STARTING, _J.RUNNING, _J.RECOVERING, _J.SUSPENDING),
            _E.CANCEL,
            _J.CANCELLING,
        ),
        ((_J.QUEUED, _J.SUSPENDED), _E.CANCEL, _J.CANCELLED),
        (_J.CANCELLING, _E.DEAD, _J.CANCELLED),
    ),
)
