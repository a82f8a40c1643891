"""A day of 16,384 nodes in virtual time: sick ones leave, well ones stay, and never too many go at once.

    .venv/bin/python tests/bench/fleet_health.py [--seed N] [--nodes 16384] [--hours 24] [--wrong 1]

The production triage, breaker and life cycle decide (`keepstep.decide.ward`, the shipped policy, hooks for
reset and reboot); the world is made up by a generator that knows nothing of them. Faults come with the mix
that stopped the Llama 3 405B run, 62 a day for as many nodes; what no probe can see (silent data corruption,
watchdog time-outs, software) makes no node sick here. Noise beside them: sensors that are wrong for `--wrong`
samples in a row, once or for an hour, and are told so in two reports a second until the next sample is there;
floods of XID 45; exceptions of a job's own code; agents that restart and tell all again; controllers that
restart; a rack that loses power. The checker counts by itself.

The last line is one JSON object: `missed` sick nodes that still got work ten minutes after their fault showed
(those that the breaker `held` apart), `wrongly_out` well nodes taken out, `breaches` of the blast radius.
"""

import argparse
import heapq
import json
import math
import random
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec

from keepstep.control.health import from_data
from keepstep.core.ids import JobId, Node
from keepstep.core.rules import Hook
from keepstep.core.states import WORKING, LifeState
from keepstep.decide.breaker import Sizes
from keepstep.decide.life import Outcome
from keepstep.decide.lifecycle import Situation, ended, validated
from keepstep.decide.triage import Counted, Report, Standing
from keepstep.decide.ward import Looked, Ward
from keepstep.spec.rules import load_rules

RACK, JOB = 32, 1500
SHOWN_WITHIN_S = 600.0
# How often agents sample what may flap: until then, a wrong sample stands in each report.
SAMPLED_S = {
    "gpu.lost": 1, "gpu.temperature": 5, "network.link_down": 5, "host.disk_space": 30, "gpu.pcie_width": 30,
}  # fmt: skip
# Cause -> how often in 419, how it shows, what repairs it. "": nothing that a probe sees, or no node's fault.
MIX: dict[str, tuple[int, tuple[str, ...], str]] = {
    "faulty GPU": (148, ("xid 79", "check gpu.lost", "xid 62", "xid 95", "check gpu.hung"), "reboot"),
    "HBM3": (72, ("xid 48", "xid 64", "check gpu.ecc_uncorrectable", "xid 94", "xid 63"), "reset"),
    "software": (54, ("job",), ""),
    "switch or cable": (35, ("check network.link_down", "xid 74", "check gpu.nvlink_down"), "reboot"),
    "host maintenance": (32, ("boot",), "validation"),
    "SRAM": (19, ("xid 95", "check gpu.ecc_uncorrectable"), "reset"),
    "GSP": (17, ("xid 119", "xid 120"), "reset"),
    "NIC": (7, ("nic",), "reset"),
    "watchdog": (7, ("",), ""),
    "corruption": (6, ("",), ""),
    "thermal": (6, ("check gpu.temperature",), "time"),
    "host": (16, ("silent", "boot", "check host.read_only"), "reboot"),
}


@dataclass
class Machine:
    name: Node
    epoch: int = 1
    counts: Counter[tuple[str, int, str]] = field(default_factory=Counter)
    checks: set[str] = field(default_factory=set)
    since: dict[str, float] = field(default_factory=dict)
    silent: bool = False
    needs: str = ""  # what repairs it: it is sick until then
    sick_at: float | None = None
    cause: str = ""


class World:
    def __init__(self, nodes: int, hours: float, seed: int, wrong: int = 1) -> None:
        self.chance, self.wrong = random.Random(seed), wrong
        self.end = hours * 3600.0
        self.machines = {Node(f"n{i:05}"): Machine(Node(f"n{i:05}")) for i in range(nodes)}
        names = list(self.machines)
        self.rack = {name: f"r{i // RACK}" for i, name in enumerate(names)}
        placed = [(name, JobId(f"job-{i // JOB}")) for i, name in enumerate(names) if i < nodes * 95 // 100]
        self.job = dict(placed)
        racks, jobs = Counter(self.rack.values()), Counter(self.job.values())
        self.sizes = Sizes(fleet=nodes, racks=racks, jobs=jobs)
        hooks = {"reset": Hook(command=("r",)), "reboot": Hook(command=("b",))}
        self.policy = replace(load_rules(), hooks=hooks)
        self.ward = Ward(policy=self.policy)
        self.under_way: set[tuple[Node, str]] = set()
        self.now, self._order = 0.0, count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._due: set[Node] = set()
        self.out: set[Node] = set()
        self.left: deque[tuple[float, Node]] = deque()
        self.breaches: list[str] = []
        self.missed: list[str] = []
        self.held, self.sick, self.most_out, self.looks = 0, 0, 0, 0
        self.wrongly: dict[Node, str] = {}
        self.decisions: Counter[str] = Counter()
        self.took_s: list[float] = []

    # ------------------------------------------------------------ time

    def at(self, when: float, what: Callable[[], None]) -> None:
        """The controller looks once a second."""
        heapq.heappush(self._heap, (float(math.ceil(when)), next(self._order), what))

    def run(self) -> None:
        self._due = set(self.machines)  # all have registered
        self.look()
        for minute in range(0, int(self.end), 60):
            self.at(float(minute), lambda: None)
        while self._heap and self._heap[0][0] <= self.end:
            self.now = self._heap[0][0]
            while self._heap and self._heap[0][0] == self.now:
                heapq.heappop(self._heap)[2]()
            self.look()

    def reports(self, node: Node, times: int = 1) -> None:
        """Its agent reports once a second; more often than needed changes nothing, so it is left out."""
        for number in range(times):
            self.at(self.now + number, lambda: self._due.add(node))

    # ------------------------------------------------------------ the controller

    def look(self) -> None:
        reports = {node: self.report(self.machines[node]) for node in self._due}
        self._due = set()
        began = time.process_time()
        for turn in range(20):
            looked = self.ward.look(reports, self.where, self.sizes, self.now)
            self.ward.take(looked, self.now)
            self.looks += 1
            for told in looked.told:
                self.decisions[told.kind] += 1
            for node in looked.lives:
                self.check(node)
            if turn:  # the second time, everything was told again
                reports = {}
                if not looked.moved:
                    break
        self.took_s.append(time.process_time() - began)
        for node in list(self.ward.busy):
            self.serve(node)

    def report(self, machine: Machine) -> Report:
        if machine.silent:
            return Report(checks=(Standing(name="node.silent"),))
        faults = tuple(
            Counted(kind=kind, code=code, component=part, count=n)
            for (kind, code, part), n in machine.counts.items()
        )
        machine.since = {name: machine.since.get(name, self.now) for name in machine.checks}
        checks = tuple(
            Standing(name=name, component="GPU-0", for_s=self.now - since)
            for name, since in sorted(machine.since.items())
        )
        return Report(epoch=f"boot-{machine.epoch}", checks=checks, faults=faults)

    def where(self, node: Node) -> Situation:
        machine, job = self.machines[node], self.job.get(node)
        return Situation(idle=job is None, job=job, connected=not machine.silent, rack=self.rack[node])

    def serve(self, node: Node) -> None:
        """What the rest of keepstep and the hooks do about a life."""
        life = self.ward.life(node)
        if life.state is LifeState.DRAINING and node in self.job:
            self.once(node, "leave", self.chance.uniform(5, 90), lambda: self.job.pop(node, None))
        repair = life.repair
        if life.state is LifeState.REPAIRING and repair and repair.outcome is Outcome.BEGUN:
            self.once(node, repair.key, self.chance.uniform(60, 500), lambda: self.repaired(node, repair.key))
        if life.state is LifeState.VALIDATING:
            self.once(node, f"validate {life.revision}", 240.0, lambda: self.validation(node))

    def once(self, node: Node, what: str, after_s: float, then: Callable[[], object]) -> None:
        if (node, what) not in self.under_way:
            self.under_way.add((node, what))
            self.at(self.now + after_s, lambda: (then(), None)[1])

    def repaired(self, node: Node, key: str) -> None:
        life, machine = self.ward.life(node), self.machines[node]
        if life.repair is None or life.repair.key != key or life.repair.outcome is not Outcome.BEGUN:
            return
        reboot = "reboot" in key
        if machine.needs in ("reset", "reboot" if reboot else "reset"):
            self.well(machine)
        if reboot:
            machine.epoch += 1
            machine.counts.clear()
        self.ward.lives[node] = ended(life, Outcome.DONE, "")
        self.reports(node, 6)

    def validation(self, node: Node) -> None:
        machine = self.machines[node]
        if machine.needs == "validation":
            self.well(machine)
        life = self.ward.life(node)
        if life.state is LifeState.VALIDATING:
            passed = not machine.needs
            step = validated(life, passed=passed, why="", policy=self.policy, now=self.now)
            self.ward.take(Looked(lives={node: step.life}), self.now)
            self.check(node)

    def well(self, machine: Machine) -> None:
        machine.needs, machine.checks, machine.silent = "", set(), False

    # ------------------------------------------------------------ the checker

    def check(self, node: Node) -> None:
        life, machine = self.ward.life(node), self.machines[node]
        works = life.state in WORKING
        if works and node in self.out:
            self.out.discard(node)
            if "not its own" in life.reason:
                self.left = deque(one for one in self.left if one[1] != node)
        elif not works and node not in self.out:
            self.out.add(node)
            self.left.append((self.now, node))
            if machine.sick_at is None:
                self.wrongly[node] = life.reason
            self.blast(node)
        self.most_out = max(self.most_out, len(self.out))

    def blast(self, node: Node) -> None:
        while self.left and self.now - self.left[0][0] >= 600.0:
            self.left.popleft()
        job = self.ward.life(node).out_job
        groups: list[tuple[str, int, Callable[[Node], bool]]] = [
            ("fleet", self.sizes.fleet, lambda _: True),
            ("rack", RACK, lambda other: self.rack[other] == self.rack[node]),
        ]
        if job is not None:
            size = self.sizes.jobs[job]
            groups.append((job, size, lambda other: self.ward.life(other).out_job == job))
        for name, size, within in groups:
            if sum(map(within, self.out)) > max(1, int(0.1 * size)):
                self.breaches.append(f"{name}: out at {self.now:g}")
            if sum(within(other) for _, other in self.left) > max(1, int(0.05 * size)):
                self.breaches.append(f"{name}: newly out at {self.now:g}")

    def shown(self, machine: Machine) -> None:
        """Ten minutes after a fault showed."""
        if machine.needs and self.ward.life(machine.name).state in WORKING and not machine.silent:
            held = bool(self.ward.life(machine.name).pressing)
            self.held += held
            if not held:
                self.missed.append(f"{machine.name}: {machine.cause}")


# ---------------------------------------------------------------------- the generator


def fault(world: World, machine: Machine, cause: str) -> None:
    _, shows, needs = MIX[cause]
    how = world.chance.choice(shows)
    if how == "job":
        blunder(world)
    if not needs or machine.needs or world.ward.life(machine.name).state not in WORKING:
        return
    machine.needs, machine.sick_at, machine.cause = needs, world.now, f"{cause} ({how})"
    world.sick += 1
    world.at(world.now + SHOWN_WITHIN_S, lambda: world.shown(machine))
    kind, _, what = how.partition(" ")
    if kind == "xid":
        machine.counts["xid", int(what), "GPU-0"] += world.chance.choice((1, 1, 1, 40, 1_000_000))
        if what == "79":
            machine.counts["sxid", 20034, "switch-0"] += 1
            machine.checks.add("gpu.lost")
    elif kind == "check":
        machine.checks.add(what)
    elif kind == "nic":
        machine.counts["nic", 0, "mlx5_0"] += 1
    elif kind == "boot":
        machine.epoch += 1
        machine.counts.clear()
        machine.needs = "validation"
    elif kind == "silent":
        machine.silent = True
    world.reports(machine.name, 40)
    if needs == "time":
        world.at(world.now + 3600.0, lambda: world.well(machine))
        world.at(world.now + 3600.0, lambda: world.reports(machine.name, 8))


def blunder(world: World) -> None:
    """A job's own code: the same exception on many of its GPUs within a minute."""
    job = world.chance.choice(sorted(set(world.job.values())))
    nodes = [node for node, of in world.job.items() if of == job]
    code = world.chance.choice((13, 31, 43))
    for node in world.chance.sample(nodes, min(len(nodes), world.chance.randint(4, 400))):
        machine = world.machines[node]

        def show(machine: Machine = machine) -> None:
            machine.counts["xid", code, f"GPU-{world.chance.randrange(8)}"] += world.chance.randint(1, 50)
            world.reports(machine.name)

        world.at(world.now + world.chance.uniform(0, 60), show)


def power_loss(world: World) -> None:
    """A whole rack goes, is noticed as silent, and comes up anew, not all at once."""
    rack = world.chance.choice(sorted(set(world.rack.values())))
    for node in [node for node, of in world.rack.items() if of == rack]:
        machine = world.machines[node]

        def gone(machine: Machine = machine) -> None:
            machine.silent = True
            world.reports(machine.name, 3)

        def back(machine: Machine = machine) -> None:
            machine.silent = False
            machine.epoch += 1
            machine.counts.clear()
            world.reports(machine.name, 8)

        world.at(world.now + 600.0 + world.chance.uniform(0, 3), gone)
        world.at(world.now + 1500.0 + world.chance.uniform(0, 110), back)


def noise(world: World) -> None:
    names, end, chance = list(world.machines), world.end, world.chance
    scale = len(names) / 16_384
    for _ in range(int(400 * scale)):  # sensors that flap: one bad sample, at times for an hour
        machine, began = world.machines[chance.choice(names)], chance.uniform(0, end)
        check = chance.choice(tuple(SAMPLED_S))
        for _ in range(chance.choice((1, 3, 20, 120))):
            began += SAMPLED_S[check] * (world.wrong + chance.uniform(1, 4))
            flap(world, machine, check, began)
    for _ in range(int(60 * scale)):  # floods of XID 45
        machine, began = world.machines[chance.choice(names)], chance.uniform(0, end)
        for second in range(60):
            world.at(began + second, lambda m=machine: flood(world, m))  # type: ignore[misc]
    for _ in range(int(4000 * scale)):  # agents that restart: nothing, then everything again
        node, when = chance.choice(names), chance.uniform(0, end)
        world.at(when, lambda n=node: restarted(world, n))  # type: ignore[misc]
    for _ in range(4):  # controllers that restart
        world.at(chance.uniform(0, end), lambda: controller(world))
    world.at(chance.uniform(0, end - 7200.0), lambda: power_loss(world))


def flap(world: World, machine: Machine, check: str, when: float) -> None:
    lasts = world.wrong * SAMPLED_S[check]

    def up() -> None:
        if not machine.needs:
            machine.checks.add(check)
            for second in {0, 1, lasts // 2, lasts - 1, lasts}:
                world.at(world.now + second, lambda: world.reports(machine.name))
            world.at(world.now + lasts + 1, down)

    def down() -> None:
        if not machine.needs:
            machine.checks.discard(check)
        world.reports(machine.name)

    world.at(when, up)


def flood(world: World, machine: Machine) -> None:
    machine.counts["xid", 45, "GPU-0"] += 16_667
    world.reports(machine.name)


def restarted(world: World, node: Node) -> None:
    machine = world.machines[node]
    counts, checks = machine.counts, machine.checks
    if machine.silent:
        return
    machine.counts, machine.checks = Counter(), set()
    world.reports(node)

    def again() -> None:
        machine.counts = counts + machine.counts
        machine.checks |= checks if machine.needs else set()
        world.reports(node, 3)

    world.at(world.now + 2.0, again)


def controller(world: World) -> None:
    """What is stored comes back; what was in memory does not."""
    stored = [msgspec.json.encode(life) for life in world.ward.lives.values()]
    lives = [from_data(msgspec.json.decode(data)) for data in stored]
    world.ward = Ward.remembered(world.policy, lives, world.now)
    for machine in world.machines.values():
        if machine.counts or machine.checks:
            world.reports(machine.name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int)
    parser.add_argument("--nodes", type=int, default=16_384)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--wrong", type=int, default=1, help="samples in a row")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    seed = int(commit[:12] or "0", 16) if options.seed is None else options.seed
    world = World(options.nodes, options.hours, seed, options.wrong)
    print(f"seed {seed}, {options.nodes} nodes, {options.hours:g} h")
    causes, weights = zip(*((cause, often) for cause, (often, _, _) in MIX.items()), strict=True)
    for _ in range(round(419 / 54 * 8 * options.nodes / 16_384 * options.hours / 24)):
        machine = world.machines[world.chance.choice(list(world.machines))]
        cause = world.chance.choices(causes, weights)[0]
        world.at(world.chance.uniform(0, world.end), lambda m=machine, c=cause: fault(world, m, c))  # type: ignore[misc]
    noise(world)
    began = time.process_time()
    world.run()
    for line in (
        *world.breaches[:5],
        *world.missed[:5],
        *(f"{n}: {why}" for n, why in list(world.wrongly.items())[:8]),
    ):
        print(line)
    figures = {
        "missed": len(world.missed),
        "held": world.held,
        "wrongly_out": len(world.wrongly),
        "breaches": len(world.breaches),
        "sick": world.sick,
        "most_out": world.most_out,
        "look_ms_max": round(max(world.took_s) * 1e3, 1),
        "day_cpu_s": round(time.process_time() - began, 1),
    }
    context = {
        "seed": seed, "nodes": options.nodes, "wrong": options.wrong, "decisions": dict(world.decisions),
    }  # fmt: skip
    print(json.dumps({"bench": "fleet_health", "figures": figures, "context": context}))


if __name__ == "__main__":
    main()
