"""What must hold whatever happens: a small world under faults, driven by decide, judged by checkers.

The checkers look at what is true in the world and know nothing of how decisions are made; of the deciding
package they import only the types. A failing scenario is printed with its faults, shortest first.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golden.decide_script import spec_of
from keepstep.core.ids import Attempt, JobId, Node
from keepstep.core.states import JOB, AttemptState, JobState
from keepstep.decide.account import BUCKETS, Moment, ledger
from keepstep.decide.plan import End, Place, Plan, Policy, Wait
from keepstep.decide.view import JobView, PartPhase, RankPhase, View, Wanted
from property.deciding_world import Controller, Gang, Host, Known, World

PROFILE = settings(
    max_examples=120, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
FAULTS_END, END = 120, 900
POLICY = Policy(
    hold_after_s=30.0, grow_after_s=5.0, grow_within_s=20.0, backoff_max_s=20.0, no_progress_max=50
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    at: int
    kind: str
    target: int
    seconds: int


@dataclass(frozen=True, kw_only=True)
class Scenario:
    nodes: int
    jobs: tuple[dict[str, str], ...]
    faults: tuple[Fault, ...]


KINDS = (
    *("crash", "lose", "cut", "split", "cut all", "cut gang", "restart", "pause"),
    *("suspend", "resume", "cancel"),
)
faults = st.builds(
    Fault,
    at=st.integers(1, FAULTS_END - 1),
    kind=st.sampled_from(KINDS),
    target=st.integers(0, 5),
    seconds=st.sampled_from([1, 2, 4, 8, 20, 40, 70, 140]),
)
jobs = st.builds(
    lambda kind, nodes, spares, shrinks, priority: {
        **({} if kind == "llama" else {"script": "yes"}),
        **({"fenced": "yes"} if kind == "fenced" else {}),
        "name": "blind" if kind == "blind" else "job",
        "nodes": str(nodes),
        "dp": str(nodes),
        "min_dp": "1" if shrinks else str(nodes),
        "spares": str(spares),
        "priority": str(priority),
        "steps": "100",
        "restarts": "100",
        "self_fence": "10",
        "orphan_lease": "60",
    },
    kind=st.sampled_from(["llama", "llama", "script", "fenced", "blind"]),
    nodes=st.integers(1, 2),
    spares=st.integers(0, 1),
    shrinks=st.booleans(),
    priority=st.sampled_from([0, 50]),
)
scenarios = st.builds(
    Scenario,
    nodes=st.integers(2, 4),
    jobs=st.lists(jobs, min_size=1, max_size=2).map(tuple),
    faults=st.lists(faults, min_size=1, max_size=8).map(
        lambda found: tuple(sorted(found, key=lambda fault: fault.at))
    ),
)


def dense(seed: int) -> Scenario:
    """More trouble than hypothesis makes by itself, from a number that repeats it."""
    chance = random.Random(seed)
    found = [
        Fault(
            at=chance.randrange(1, FAULTS_END),
            kind=chance.choice(KINDS[:-3] if chance.random() < 0.9 else KINDS),
            target=chance.randrange(6),
            seconds=chance.choice([1, 2, 4, 8, 20, 40, 70, 140]),
        )
        for _ in range(chance.randrange(2, 9))
    ]
    said = {
        "nodes": "2",
        "dp": "2",
        "steps": "150",
        "restarts": "100",
        "self_fence": "10",
        "orphan_lease": str(chance.choice([30, 60])),
        "spares": str(chance.randrange(2)),
        "min_dp": str(chance.choice([1, 2])),
    }
    kind = chance.choice(["llama", "script", "fenced", "blind"])
    said |= {"name": "blind" if kind == "blind" else "job"}
    said |= {} if kind == "llama" else {"script": "yes"}
    said |= {"fenced": "yes"} if kind == "fenced" else {}
    nodes = chance.choice([2, 3, 4])
    return Scenario(nodes=nodes, jobs=(said,), faults=tuple(sorted(found, key=lambda fault: fault.at)))


# ---------------------------------------------------------------------------- the checkers


def no_two_attempts_at_once(world: World) -> None:
    """Once a newer attempt goes, no rank of an older one can step, or write where writes are not fenced."""
    for gang in world.gangs.values():
        newer = [one for one in world.gangs.values() if one.job == gang.job and one.attempt > gang.attempt]
        if not any(one.started for one in newer):
            continue
        assert not (world.whole(gang) and not gang.finished), f"attempt {gang.attempt} can still step"
        fenced = gang.spec.run.kind == "llama" or gang.spec.recovery.fenced
        assert fenced or not world.running_ranks(gang), f"attempt {gang.attempt} can still write"


def no_accepted_job_forgotten(view: View, plan: Plan) -> None:
    """Whoever does not train has a reason and a next deadline, or something is done about it."""
    changes = {change.job: change for change in plan.changes}
    assert len(changes) == len(plan.changes), "one change of a job at a time"
    for job in view.jobs:
        change = changes.get(job.id)
        trains = job.attempt is not None and job.attempt.state in (
            AttemptState.STARTING,
            AttemptState.RUNNING,
        )
        rests = job.state is JobState.SUSPENDED and job.wanted is Wanted.SUSPEND
        assert change is not None or trains or rests, f"{job.id} is {job.state} and forgotten"
        if change is not None:
            assert change.reason, change
        if isinstance(change, Wait):
            assert change.due_s > 0, f"{change} has no deadline"


def nothing_restored_off_the_chain(controller: Controller, view: View, plan: Plan) -> None:
    """What is restored is a state that the last attempt went through, and the newest such that was listed."""
    world = controller.world
    for change in plan.changes:
        if not isinstance(change, Place) or change.attempt == 1:
            continue
        job = next(one for one in view.jobs if one.id == change.job)
        if job.spec.run.kind != "llama":
            assert change.restore is None
            continue
        last = world.gangs[job.id, Attempt(change.attempt - 1)]
        assert job.inventory is not None
        assert job.inventory.after_attempt == last.attempt, "it was listed before the last attempt was dead"
        listed = job.inventory.stored
        contents = world.stored.get(job.id, {})
        on_chain = [one.step for one in listed if list(contents[one]) == last.path[: one.step]]
        at = change.restore
        assert (at.step if at is not None else 0) == max(on_chain, default=0), (at, on_chain)
        if at is not None:
            assert list(contents[at]) == last.path[: at.step], f"{at} is on a branch that was left"
            assert (change.link.parent, change.link.parent_step) == (at.attempt, at.step)


def no_healthy_gang_ended(world: World, view: View, plan: Plan) -> None:
    """A gang of which every rank runs is not ended, unless nobody answered for the whole orphan lease."""
    for change in plan.changes:
        if not isinstance(change, End) or change.verdict is None:
            continue
        job = next(one for one in view.jobs if one.id == change.job)
        gang = world.gangs[change.job, change.attempt]
        silences = [node.silence_s for node in view.nodes if node.name in gang.nodes]
        orphaned = min(silences) >= job.spec.recovery.orphan_lease_s
        assert orphaned or gang.finished or not world.whole(gang), change


def no_node_given_twice(view: View, plan: Plan) -> None:
    """A node serves one job, and nothing is placed on a node that does not answer or is not clean."""
    taken: dict[Node, JobId] = {}
    for job in view.jobs:
        if job.attempt is not None:
            taken |= dict.fromkeys((*job.attempt.nodes, *job.attempt.spares), job.id)
    for change in plan.changes:
        if isinstance(change, Place):
            for name in (*change.nodes, *change.spares):
                assert name not in taken, f"{name} is {taken[name]}'s"
                taken[name] = change.job
                node = next(one for one in view.nodes if one.name == name)
                assert node.connected and not node.confirmed and not node.lingering, node


def every_wait_ends(controller: Controller) -> None:
    """Long after the last fault every job is over, or rests because its owner wants it to."""
    for job in controller.jobs.values():
        rests = job.state is JobState.SUSPENDED and job.wanted is Wanted.SUSPEND
        assert job.state in JOB.final or rests, f"{job.id} is still {job.state}: {job.reason}"


# ---------------------------------------------------------------------------- the run


def begin(scenario: Scenario) -> Controller:
    names = [Node(name) for name in "abcd"[: scenario.nodes]]
    world = World(hosts={name: Host(name=name) for name in names})
    made: dict[JobId, JobView] = {}
    for number, said in enumerate(scenario.jobs, 1):
        name = JobId(f"{said['name']}{number}")
        spec = spec_of(name, {key: value for key, value in said.items() if key != "name"})
        made[name] = JobView(id=name, spec=spec, state=JobState.QUEUED, number=number)
    known = {name: Known() for name in names}
    return Controller(world=world, policy=POLICY, jobs=made, known=known)


def strike(controller: Controller, fault: Fault) -> None:
    """One fault, or one wish of an owner."""
    world, now = controller.world, controller.world.now
    hosts = list(world.hosts.values())
    host = hosts[fault.target % len(hosts)]
    name = list(controller.jobs)[fault.target % len(controller.jobs)]
    job = controller.jobs[name]
    match fault.kind:
        case "crash":
            gangs = [gang for gang in world.gangs.values() if world.running_ranks(gang)]
            if gangs:
                crash(world, gangs[-1], fault.target)
        case "split" if job.attempt is not None and len(job.attempt.nodes) > 1:
            away, left = job.attempt.nodes[fault.target % 2], job.attempt.nodes[1 - fault.target % 2]
            world.hosts[away].cut_until = now + 20 + fault.seconds
            crash(world, world.gangs[name, job.attempt.number], fault.target, (left,))
        case "split":
            pass
        case "lose":
            lose(controller, host, fault.seconds)
        case "cut":
            host.cut_until = max(host.cut_until, now + fault.seconds)
        case "cut all" | "cut gang":
            only = job.attempt.nodes if job.attempt is not None else ()
            for one in hosts:
                if fault.kind == "cut all" or one.name in only:
                    one.cut_until = max(one.cut_until, now + fault.seconds)
        case "restart":
            controller.restart(fault.seconds)
        case "pause":
            controller.away_until = now + fault.seconds
        case wish if job.state not in JOB.final:
            controller.jobs[name] = replace(job, wanted=wishes(job)[wish])


def wishes(job: JobView) -> dict[str, Wanted]:
    final = job.wanted is Wanted.CANCEL
    return {
        "suspend": Wanted.CANCEL if final else Wanted.SUSPEND,
        "resume": Wanted.CANCEL if final else Wanted.RUN,
        "cancel": Wanted.CANCEL,
    }


def crash(world: World, gang: Gang, target: int, only: tuple[Node, ...] = ()) -> None:
    """One rank raises; its node's shim notes it."""
    for node in only or gang.nodes:
        part = world.part(gang, node)
        for number, rank in part.ranks.items() if part is not None else ():
            if rank.phase is RankPhase.RUNNING and part is not None:
                failed = replace(rank, phase=RankPhase.EXITED, exit_code=1, exit_order=1)
                part.ranks[number] = replace(failed, error=f"boom {target}", exited_age_s=float(world.now))
                return


def lose(controller: Controller, host: Host, seconds: int) -> None:
    """Everything on it dies. It comes back after a while; that it died is known in between, or not at all."""
    if not host.up:
        return
    world = controller.world
    for key, part in host.parts.items():
        if part.phase is not PartPhase.DEAD:
            host.end(key, 9, world.now)
    host.up, host.back_at = False, world.now + 4 * seconds
    if seconds % 8 == 0:
        controller.confirms[host.name] = world.now + seconds
    else:
        controller.confirms.pop(host.name, None)


Witness = Callable[[Controller, View, Plan], None]


def watch(controller: Controller, view: View, plan: Plan) -> None:
    """Every plan is judged before it is taken, against what is true at that moment."""
    no_accepted_job_forgotten(view, plan)
    nothing_restored_off_the_chain(controller, view, plan)
    no_healthy_gang_ended(controller.world, view, plan)
    no_node_given_twice(view, plan)


def play(scenario: Scenario, witness: Witness = watch) -> Controller:
    controller = begin(scenario)
    controller.witness = witness
    waiting = list(scenario.faults)
    while controller.world.now < END:
        controller.world.advance()
        while waiting and waiting[0].at <= controller.world.now:
            strike(controller, waiting.pop(0))
        controller.tick()
        no_two_attempts_at_once(controller.world)
        if all(job.state in JOB.final for job in controller.jobs.values()):
            break
    every_wait_ends(controller)
    return controller


@PROFILE
@given(scenarios)
def test_what_must_never_happen_does_not(scenario: Scenario) -> None:
    play(scenario)


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_nor_under_dense_faults(first: int) -> None:
    for seed in range(first, first + 25):
        try:
            play(dense(seed))
        except AssertionError as problem:
            raise AssertionError(f"seed {seed}: {problem}\n{dense(seed)}") from problem


GANG = {"name": "job", "nodes": "2", "dp": "2", "steps": "150", "self_fence": "10", "orphan_lease": "30"}
HARD = {
    # Its ranks on the silent node stepped until the others died, however long it was silent.
    "silent for long, then a crash elsewhere": (
        {"script": "yes", "orphan_lease": "300"},
        [(20, "cut", 1, 70), (50, "crash", 0, 1)],
    ),
    "alone for less than its self-fence": ({"script": "yes"}, [(20, "split", 0, 40)]),
    "fenced, and still blocked": ({"script": "yes", "fenced": "yes"}, [(20, "split", 1, 40)]),
    "never seen to step": ({"script": "yes", "name": "blind"}, [(20, "split", 0, 40)]),
    # Its agents renew their lease until the next attempt raises the fence.
    "orphaned, and trains on": ({}, [(10, "cut gang", 0, 140)]),
    "ended, but nobody hears it": (
        {},
        [(20, "cut gang", 0, 70), (20, "suspend", 0, 1), (40, "resume", 0, 1)],
    ),
    # The writer that was cut off commits after the next attempt has branched off before it.
    "a late commit, then a crash": ({}, [(26, "split", 0, 40), (42, "crash", 0, 1)]),
    "one crash after the other": ({}, [(30, "crash", 0, 1), (60, "crash", 1, 1), (90, "crash", 2, 1)]),
    "a cut controller": ({}, [(20, "cut all", 0, 20), (70, "restart", 0, 8), (90, "pause", 0, 140)]),
}


@pytest.mark.parametrize("case", HARD)
def test_nor_in_cases_that_are_hard(case: str) -> None:
    said, found = HARD[case]
    struck = tuple(Fault(at=at, kind=kind, target=target, seconds=s) for at, kind, target, s in found)
    play(Scenario(nodes=4, jobs=({**GANG, **said},), faults=struck))


def test_an_undisturbed_job_needs_one_attempt() -> None:
    said = {"name": "job", "nodes": "2", "dp": "2", "steps": "60", "spares": "1"}
    scenario = Scenario(nodes=3, jobs=(said,), faults=())
    job = play(scenario).jobs[JobId("job1")]
    assert (job.state, job.attempts) == (JobState.SUCCEEDED, 1)


def test_the_checkers_can_fail() -> None:
    """Two attempts that run at once are seen."""
    said = {"name": "job", "nodes": "1", "dp": "1", "steps": "60"}
    controller = begin(Scenario(nodes=1, jobs=(said,), faults=()))
    world = controller.world
    while not any(gang.started for gang in world.gangs.values()):
        world.advance()
        controller.tick()
    first = next(iter(world.gangs.values()))
    world.gangs[first.job, Attempt(2)] = replace(first, attempt=Attempt(2))
    with pytest.raises(AssertionError, match="attempt 1 can still step"):
        no_two_attempts_at_once(world)


# ---------------------------------------------------------------------------- the ledger

KIND: Any = st.sampled_from(list(Moment.__annotations__["kind"].__args__))
moments = st.lists(
    st.builds(
        Moment,
        at_s=st.floats(0, 100, allow_nan=False),
        kind=KIND,
        attempt=st.integers(1, 3).map(Attempt),
        step=st.integers(0, 50),
        slots=st.integers(0, 8),
        spare_slots=st.integers(0, 4),
        incident=st.none() | st.integers(1, 3),
        seconds=st.floats(0, 30, allow_nan=False),
    ),
    max_size=20,
)


def slots_held(found: list[Moment], until_s: float) -> int:
    """Slots x time by itself: what was asked for or held, from one recorded change to the next."""
    now, total, held, slots = 0, 0, False, 0
    until = round(until_s * 1e6)
    for index, moment in enumerate(found):
        at = round(moment.at_s * 1e6)
        at = at if index == 0 else now if moment.kind == "failed" else max(now, at)
        total += slots * (max(0, min(at, until) - min(now, until)) if held else 0)
        now = at
        if now > until:
            break
        if moment.kind in ("submitted", "queued"):
            held, slots = True, moment.slots
        elif moment.kind == "placed":
            held, slots = True, moment.slots + moment.spare_slots
        elif moment.kind in ("suspended", "finished"):
            held, slots = False, 0
    return total + slots * (max(0, until - now) if held else 0)


@PROFILE
@given(moments, st.floats(0, 150, allow_nan=False))
def test_the_ledger_sums_exactly(found: list[Moment], until_s: float) -> None:
    """Every slot-second is in exactly one bucket, and no incident cost more than was spent."""
    account = ledger(found, until_s)
    assert set(account.buckets) == set(BUCKETS)
    assert min(account.buckets.values()) >= 0
    assert sum(account.buckets.values()) == account.total == slots_held(found, until_s)
    costs = sum(sum(cost.values()) for cost in account.incidents.values())
    assert costs <= account.total
    assert 0 <= account.goodput_with_spares <= account.goodput <= 1
