"""The rank's side of keepstep: progress that the agent reads, and states that stay in memory.

Standard library only, but for keepstep.session.snapshot, which keeps a script's tensors.
"""

from keepstep.core.beacon import Phase
from keepstep.session.progress import Session, current

__all__ = ["Phase", "Session", "current"]
