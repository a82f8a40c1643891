"""The contract of a pool.

A pool knows how to bring an agent up on a node, how to take it down, and what it can say for certain about a
node. It starts no ranks and decides nothing about jobs: agents are the same program everywhere. Pools whose
nodes are somebody else's until a job needs them are told what jobs want, and tell what they got.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Protocol

from keepstep.core.ids import JobId, Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """What an unfinished job needs: whole nodes, all of the gang's or none, and spares if there are some."""

    job: JobId
    nodes: int
    slots: int  # of each node, at least
    spares: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)  # selectors of its nodes' labels
    using: frozenset[Node] = frozenset()  # where its present attempt runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the controller knows, at this moment."""

    connected: Callable[[Node], bool]
    wants: tuple[Want, ...] = ()  # by priority, then age
    cordoned: Set[Node] = frozenset()
    drained: Mapping[Node, str] = field(default_factory=dict)  # for good, and why: others may leave them, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A node that the pool could bring an agent up on, or has."""

    name: Node
    slots: int
    leaves: str = ""  # why it will be gone soon, or ""
    leaves_in_s: float | None = None  # None: nobody said when


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """Something that belongs into the timeline."""

    kind: str
    text: str
    node: Node | None = None
    job: JobId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    nodes: tuple[Known, ...] = ()
    waits: Mapping[JobId, str] = field(default_factory=dict)  # why a job's nodes are not there yet
    news: tuple[News, ...] = ()  # since it was last asked


class Pool(Protocol):
    @property
    def name(self) -> str:
        """What a job's spec calls it."""
        ...

    async def reconcile(self, asked: Asked) -> Told:
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
