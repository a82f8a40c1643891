"""The contract of a pool.

A pool knows how to bring an agent up on a node, how to take it down, and what it can say for certain about a
node. It starts no ranks and decides nothing about jobs: agents are the same program everywhere.
"""

from collections.abc import Callable
from typing import Protocol

from keepstep.core.ids import Node


class Pool(Protocol):
    @property
    def name(self) -> str:
        """What a job's spec calls it."""
        ...

    async def reconcile(self, connected: Callable[[Node], bool]) -> None:
        """Bring up what is missing. Called about once a second; must return quickly."""
        ...

    async def confirm_dead(self, node: Node) -> str:
        """Positive evidence that nothing of the node runs any more, as a sentence; "" if there is none.

        Silence is no evidence. A pool that cannot know says "" for ever, and leaves it to a person.
        """
        ...

    async def close(self, *, stop: bool) -> None:
        """The controller goes. `stop`: take this pool's agents down, too."""
        ...
