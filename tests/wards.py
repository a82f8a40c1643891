"""A fleet in virtual time for the production triage: reports are said, lives are read."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from keepstep.core.ids import JobId, Node
from keepstep.core.rules import TriagePolicy
from keepstep.core.states import LifeState
from keepstep.decide.breaker import Sizes
from keepstep.decide.life import Life
from keepstep.decide.lifecycle import Situation, Step, untested, validated
from keepstep.decide.triage import Counted, Report, Standing
from keepstep.decide.ward import Looked, Told, Ward
from keepstep.spec.rules import load_rules

_LOOKS_MAX = 20
_RESETS = ["drain and reset", "reboot", "replace"]
# By the fact sheet, not by the policy file: XID -> class, what is done the first, second and third time.
XIDS: dict[int, tuple[str, list[str]]] = {
    **dict.fromkeys((13, 31), ("application", ["restart the application", "validate when idle"])),
    **dict.fromkeys((43, 68, 69), ("application", ["restart the application"])),
    45: ("application", []),
    **dict.fromkeys(
        (48, 62, 64, 74, 95, 110, 119, 120, 136, 140, 155, 156, 158), ("gpu", _RESETS)
    ),
    **dict.fromkeys((61, 92, 121), ("gpu", ["watch"])),
    63: ("gpu", ["reset when idle"]),
    79: ("gpu", ["reboot", "replace"]),
    94: ("gpu", ["reset when idle"]),
    109: ("application", ["restart the application", "drain and reset"]),
    143: ("gpu", ["drain and reset", "replace"]),
    **dict.fromkeys((144, 145, 146, 147, 148, 150), ("fabric", _RESETS)),
    149: ("fabric", ["watch"]),
    154: ("gpu", []),
}  # fmt: skip


def xid(
    code: int, count: int = 1, component: str = "GPU-1", age_s: float = 0.0, kind: str = "xid"
) -> Counted:
    return Counted(kind=kind, code=code, component=component, count=count, age_s=age_s)


def check(name: str, component: str = "GPU-1", level: str = "bad", value: float = 0.0) -> Standing:
    return Standing(name=name, component=component, level=level, value=value, for_s=60.0)


@dataclass
class Fleet:
    """`jobs` and `racks`: by node. Nodes without a job are idle."""

    nodes: tuple[str, ...] = ("a",)
    policy: TriagePolicy = field(default_factory=load_rules)
    jobs: dict[str, str] = field(default_factory=dict)
    racks: dict[str, str] = field(default_factory=dict)
    now: float = 1000.0
    told: list[Told] = field(default_factory=list)
    situations: dict[str, Any] = field(default_factory=dict)
    ward: Ward = field(init=False)

    def __post_init__(self) -> None:
        self.ward = Ward(policy=self.policy)

    def where(self, node: Node) -> Situation:
        job = JobId(self.jobs[node]) if node in self.jobs else None
        at = Situation(idle=job is None, job=job, rack=self.racks.get(node, ""))
        return replace(at, **self.situations.get(node, {}))

    def sizes(self) -> Sizes:
        jobs = [JobId(job) for job in self.jobs.values()]
        racks = list(self.racks.values())
        return Sizes(
            fleet=len(self.nodes),
            racks={rack: racks.count(rack) for rack in racks},
            jobs={job: jobs.count(job) for job in jobs},
        )

    def say(self, **reports: Report) -> None:
        """One report of some nodes; then looks until nothing moves."""
        first = {Node(name): report for name, report in reports.items()}
        for _ in range(_LOOKS_MAX):
            going = [Node(name) for name, said in self.situations.items() if said.get("leaves")]
            looked = self.ward.look(first, self.where, self.sizes(), self.now, going)
            self.take(looked)
            first = {}
            if not looked.moved:
                return
        raise AssertionError("it never comes to rest")

    def take(self, looked: Looked) -> None:
        self.ward.take(looked, self.now)
        self.told += looked.told

    def report(self, node: str, *what: Counted | Standing, epoch: str = "boot-1", times: int = 1) -> Life:
        """Reports of one node, a second apart."""
        faults = tuple(one for one in what if isinstance(one, Counted))
        checks = tuple(one for one in what if isinstance(one, Standing))
        for _ in range(times):
            self.say(**{node: Report(epoch=epoch, checks=checks, faults=faults)})
            self.now += 1.0
        return self.life(node)

    def validated(self, node: str, passed: bool, why: str = "") -> None:
        """The word of a validation."""
        self._moved(
            node, validated(self.life(node), passed=passed, why=why, policy=self.policy, now=self.now)
        )

    def untested(self, node: str, why: str) -> None:
        """The word of a validation that could try nothing."""
        self._moved(node, untested(self.life(node), why=why, now=self.now))

    def _moved(self, node: str, step: Step) -> None:
        self.take(
            Looked(
                lives={Node(node): step.life},
                told=[Told(kind=f"node {step.life.state}", text=step.told, node=Node(node))],
            )
        )
        self.wait(1.0)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.say()

    def life(self, node: str) -> Life:
        return self.ward.life(Node(node))

    def state(self, node: str) -> LifeState:
        return self.life(node).state

    def restart(self) -> None:
        """Another controller: it knows what was stored."""
        self.ward = Ward.remembered(self.policy, list(self.ward.lives.values()), self.now)

    def lines(self, kind: str) -> list[str]:
        return [one.text for one in self.told if one.kind == kind]

    def until(self, done: Callable[[], bool], step_s: float, most: int = 1000) -> None:
        for _ in range(most):
            if done():
                return
            self.wait(step_s)
        raise AssertionError("it did not come to that")
