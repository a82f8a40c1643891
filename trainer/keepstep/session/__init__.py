"""The rank's side of keepstep: progress that the agent reads. Standard library only."""

from keepstep.core.beacon import Phase
from keepstep.session.progress import Session, current

__all__ = ["Phase", "Session", "current"]
