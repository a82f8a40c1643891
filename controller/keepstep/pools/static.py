"""Nodes whose agents are started by somebody else: by hand, by systemd, by srun.

Agents register themselves with a join token. The pool can neither start nor confirm anything, so the death of
such a node is confirmed by a person (`keepstep node confirm-lost`), by its return, or by the fence.
"""

from dataclasses import dataclass

from keepstep.core.ids import Node
from keepstep.pools.pool import Asked, Told


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticPool:
    name: str = "static"

    async def reconcile(self, asked: Asked) -> Told:
        return Told()

    async def confirm_dead(self, node: Node) -> str:
        return ""

    async def close(self, *, stop: bool) -> None:
        return None
