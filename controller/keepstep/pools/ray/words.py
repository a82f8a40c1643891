"""What the pool and its driver say to each other: one JSON object a line, each of them the whole of its kind.

Both directions are levels. A line that is lost with a process is said again by the next one.
"""

import msgspec

NAMESPACE = "keepstep"


class RayNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node as Ray's control service knows it."""

    id: str
    name: str
    address: str
    alive: bool
    total: dict[str, float] = {}
    available: dict[str, float] = {}
    labels: dict[str, str] = {}
    death: str = ""  # Ray's word for how it died
    orderly: bool = False  # it ended by itself or was told to: its processes ended with it
    draining: bool = False
    drains_in_s: float | None = None  # None: without a deadline


class Group(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    state: str  # PENDING | CREATED | RESCHEDULING
    nodes: tuple[str, ...]  # by bundle; "": not placed
    resources: dict[str, float] = {}  # of each bundle


class Actor(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    node: str


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What matters of the cluster at one moment. `groups` and `actors` are this controller's own."""

    cluster: str = ""  # another one after a head was started anew
    version: str = ""
    nodes: tuple[RayNode, ...] = ()
    groups: tuple[Group, ...] = ()
    actors: tuple[Actor, ...] = ()
    failures: dict[str, str] = {}  # actors that could not begin, with why
    problem: str = ""  # why there is nothing to be seen; the driver has ended


class WantedGroup(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    bundles: int
    resources: dict[str, float]
    selector: dict[str, str]  # for each bundle


class WantedAgent(msgspec.Struct, frozen=True, kw_only=True):
    actor: str
    group: str
    bundle: int
    ray_node: str
    resources: dict[str, float]
    node: str  # keepstep's name of it
    folder: str
    arguments: tuple[str, ...] = ()
    endpoint: str = ""  # JSON with url and token
    renewed: int = 0  # how often its endpoint was given anew


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """All groups and agents that should be; what else carries our prefix is removed."""

    groups: tuple[WantedGroup, ...] = ()
    agents: tuple[WantedAgent, ...] = ()
    drains: dict[str, str] = {}  # Ray's ids of nodes that Ray is to drain, with why
