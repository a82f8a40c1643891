"""The operator's policy on node health: which fault means what, and what is done about it.

People write it as YAML (`keepstep.spec.rules`); the file that ships with keepstep is `spec/triage.yaml`. A
**rule** takes faults and checks by their words (`core.health`) and says their class and what is done the
first, second and third time on the same component. Seconds unless a name says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from keepstep.core.health import CHECKS, FaultKind


class Class(StrEnum):
    """Whose fault it is, as long as nothing else speaks against it."""

    APPLICATION = "application"
    GPU = "gpu"
    NODE = "node"
    FABRIC = "fabric"


class Action(StrEnum):
    """What is done, from the least to the most."""

    NOTHING = "nothing"
    WATCH = "watch"  # counts into the suspicion; enough of it, and the node gets no new work
    RESTART = "restart the application"  # which its own recovery does; noted against the component
    SUSPECT = "suspect"  # no new work while it stands
    DIAGNOSE = "validate when idle"
    RESET_IDLE = "reset when idle"
    RESET = "drain and reset"
    REBOOT = "reboot"
    REPLACE = "replace"

    @property
    def severity(self) -> int:
        return _SEVERITY[self]

    @property
    def takes_out(self) -> bool:
        """Whether the node leaves service for it."""
        return self.severity >= _SEVERITY[Action.DIAGNOSE]

    @property
    def drains(self) -> bool:
        """Whether its job leaves it before its end."""
        return self.severity >= _SEVERITY[Action.RESET]


_SEVERITY = {action: number for number, action in enumerate(Action)}

# What the controller itself sees of a node, beside the checks of its agent.
OWN_CHECKS = {
    "node.silent": "no word from its agent, while others of its rack talk",
    "node.rebooted": "it came up anew and nobody had asked for that",
}
KINDS = {str(kind): f"events of kind {kind}" for kind in FaultKind if kind not in ("xid", "sxid")}
SIGNALS: Mapping[str, str] = {**CHECKS, **OWN_CHECKS, **KINDS}
BY_NUMBER = (FaultKind.XID, FaultKind.SXID)
HOOKS = ("reset", "reboot", "ticket")
WAYS = ("command", "webhook", "kubernetes", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Fewer events than this within the window are only noted."""

    times: int
    within_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    name: str
    xids: frozenset[int] = frozenset()
    sxids: frozenset[int] = frozenset()
    signals: frozenset[str] = frozenset()  # of SIGNALS
    level: Literal["warn", "bad"] = "bad"  # a check must stand at this at least
    stands_s: float = 0.0  # a check's own age: more than one sample, where it is sampled seldom
    of: Class
    actions: tuple[Action, ...]  # the first time, the second, ...; the last one for all that follow
    within_s: float = 7 * 86_400.0  # how long a time counts
    needs: Needs | None = None
    at_once: bool = False  # its job cannot go on anyhow: nothing is waited for
    obeys: Mapping[int, Action] = field(default_factory=dict)  # by the check's value; others as `actions`
    why: str = ""

    def takes(self, kind: str, code: int) -> bool:
        if kind == FaultKind.XID:
            return code in self.xids
        if kind == FaultKind.SXID:
            return code in self.sxids
        return kind in self.signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much may be out at once; one node always may."""

    share: float = 0.10
    share_soon: float = 0.05  # newly, within ...
    soon_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """The same on so many at nearly the same time has one cause elsewhere."""

    within_s: float = 120.0
    job_gpus: int = 2  # faults of class application: components of one job
    job_nodes: int = 3  # all others: nodes of one job
    rack_nodes: int = 3
    rack_label: str = "rack"  # of nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Hysteresis:
    bad: int = 2  # reports in a row until a check counts
    good: int = 5  # and until it is over
    cool_down_s: float = 1800.0  # least time out of service
    burst_gap_s: float = 60.0  # events closer than this are one
    burst_s: float = 600.0  # but not for longer than this
    past_s: float = 600.0  # an event that is first told so late is history, unless nobody watched since


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """Each watched event weighs one, and half as much after each half-life."""

    out_at: float = 3.0
    half_life_s: float = 6 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lemon:
    """A node that keeps coming back: what was decided about it, by weight, fading over weeks."""

    replace_at: float = 4.0
    half_life_s: float = 14 * 86_400.0
    repairs_max: int = 3  # within ...
    repairs_s: float = 7 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    drain_s: float = 600.0  # for the job's snapshot and a spare
    idle_s: float = 7 * 86_400.0  # for the job to end by itself
    suspect_s: float = 86_400.0
    return_s: float = 1200.0  # for a repaired node to report again
    validate_s: float = 1800.0
    probation_s: float = 86_400.0
    silent_s: float = 600.0  # until a node that says nothing counts as broken


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """How keepstep has something done that it cannot do itself. Just one of the first four is given."""

    command: tuple[str, ...] = ()
    webhook: str = ""
    kubernetes: str = ""  # what the node is called there
    ray: str = ""
    within_s: float = 600.0
    tries: int = 2

    @property
    def way(self) -> str:
        return next((way for way in WAYS[1:] if getattr(self, way)), WAYS[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class TriagePolicy:
    rules: tuple[Rule, ...]  # the first that takes a fault has it
    bounds: Bounds = Bounds()
    correlation: Correlation = Correlation()
    hysteresis: Hysteresis = Hysteresis()
    suspicion: Suspicion = Suspicion()
    lemon: Lemon = Lemon()
    deadlines: Deadlines = Deadlines()
    hooks: Mapping[str, Hook] = field(default_factory=dict)  # by name, of HOOKS
    source: str = ""  # where it was read from

    def rule(self, kind: str, code: int = 0) -> Rule | None:
        return next((rule for rule in self.rules if rule.takes(kind, code)), None)
