"""Every state machine: one table in one file each."""

from keepstep.core.states.attempt import ATTEMPT, AttemptEvent, AttemptState
from keepstep.core.states.cell import CELL, CellEvent, CellState
from keepstep.core.states.incident import INCIDENT, IncidentEvent, IncidentState
from keepstep.core.states.job import JOB, JobEvent, JobState
from keepstep.core.states.life import HELD, LIFE, WORKING, LifeEvent, LifeState
from keepstep.core.states.node import NODE, NodeEvent, NodeState

__all__ = [
    "ATTEMPT",
    "CELL",
    "HELD",
    "INCIDENT",
    "JOB",
    "LIFE",
    "NODE",
    "WORKING",
    "AttemptEvent",
    "AttemptState",
    "CellEvent",
    "CellState",
    "IncidentEvent",
    "IncidentState",
    "JobEvent",
    "JobState",
    "LifeEvent",
    "LifeState",
    "NodeEvent",
    "NodeState",
]
