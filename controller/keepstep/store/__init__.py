"""What a controller must not forget: jobs, attempts, nodes, incidents, decisions, and who may write them."""

from keepstep.store.lease import this_process
from keepstep.store.store import Store
from keepstep.store.writer import Writer

__all__ = ["Store", "Writer", "this_process"]
