"""The rank's side of keepstep: progress that the agent reads, and states that stay in memory.

Standard library only, but for what keeps a script's tensors: keepstep.session.snapshot, and the callbacks
that use it, keepstep.session.huggingface and keepstep.session.lightning, which need these libraries.
"""

from keepstep.core.beacon import Phase
from keepstep.session.progress import Session, current

__all__ = ["Phase", "Session", "current"]
