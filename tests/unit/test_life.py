"""A node's way out of service and back: repairs, validation, probation, the breaker, people."""

from dataclasses import replace

import pytest

from keepstep.core.errors import Refused
from keepstep.core.ids import Node
from keepstep.core.rules import Action, Hook
from keepstep.core.states import LifeState
from keepstep.decide.asked import Wish, granted, screened
from keepstep.decide.life import Outcome, lemon, lemon_by_week
from keepstep.decide.lifecycle import ended
from keepstep.decide.ward import Looked
from keepstep.spec.rules import load_rules
from wards import Fleet, check, xid

HOOKED = replace(load_rules(), hooks={"reset": Hook(command=("r",)), "reboot": Hook(command=("b",))})


def ask(fleet: Fleet, node: str, verb: str, who: str = "ada", **more: object) -> None:
    life = granted(fleet.life(node), Wish(verb=verb, who=who, **more), fleet.policy, fleet.now)  # type: ignore[arg-type]
    fleet.ward.lives[life.node] = life
    fleet.ward.busy.add(life.node)
    fleet.say()


def finish(fleet: Fleet, node: str, outcome: Outcome, text: str = "") -> None:
    """The hook's word."""
    fleet.ward.lives[Node(node)] = ended(fleet.life(node), outcome, text)
    fleet.wait(1.0)


def quarantine(fleet: Fleet, node: str, code: int = 48) -> None:
    fleet.report(node, xid(code))
    fleet.jobs.pop(node, None)
    fleet.until(lambda: fleet.state(node) not in (LifeState.DRAINING, LifeState.CORDONED), 30.0)


def test_the_whole_way_from_an_xid_to_healthy_again() -> None:
    fleet = Fleet(jobs={"a": "train"}, policy=HOOKED)
    assert fleet.report("a", xid(48)).state is LifeState.DRAINING
    fleet.wait(300.0)
    assert fleet.state("a") is LifeState.DRAINING  # its job has not left it yet
    quarantine(fleet, "a")
    assert fleet.state("a") is LifeState.REPAIRING
    repair = fleet.life("a").repair
    assert repair is not None
    assert repair.action is Action.RESET
    finish(fleet, "a", Outcome.DONE)
    assert fleet.state("a") is LifeState.VALIDATING
    fleet.validated("a", True, "4 checks")
    assert fleet.state("a") is LifeState.PROBATION
    fleet.wait(86_400.0)
    assert fleet.state("a") is LifeState.HEALTHY
    states = [one.kind.removeprefix("node ") for one in fleet.told if one.node == "a"]
    assert states == ["found", "draining", "quarantined", "repairing", "validating", "probation", "healthy"]


def test_repairs_that_fail_go_on_to_the_next_one_and_then_to_none() -> None:
    fleet = Fleet(policy=HOOKED)
    quarantine(fleet, "a")
    finish(fleet, "a", Outcome.FAILED, "exit code 3")
    assert (fleet.state("a"), fleet.life("a").plan) == (LifeState.REPAIRING, Action.REBOOT)
    finish(fleet, "a", Outcome.DONE)
    assert fleet.state("a") is LifeState.REPAIRING  # it has not come up anew yet
    fleet.report("a", epoch="boot-2")
    assert fleet.state("a") is LifeState.VALIDATING
    fleet.validated("a", False, "matmul differs on GPU-1")
    assert fleet.state("a") is LifeState.REPLACE
    assert "matmul differs on GPU-1" in " ".join(fleet.lines("node quarantined"))


@pytest.mark.parametrize("code", [48, 13])  # repaired first; validated at once
def test_a_node_on_which_nothing_could_be_tested_is_kept_for_a_person(code: int) -> None:
    fleet = Fleet(policy=HOOKED)
    fleet.report("a", xid(code, count=2))
    if code == 13:
        ask(fleet, "a", "validate")
    fleet.until(lambda: fleet.state("a") in (LifeState.REPAIRING, LifeState.VALIDATING), 30.0)
    if code == 48:
        finish(fleet, "a", Outcome.DONE)
    assert fleet.state("a") is LifeState.VALIDATING
    repairs = fleet.life("a").repairs

    fleet.untested("a", "no torch here")
    for _ in range(2):  # no deadline, no boot and no other controller takes it for sick, or for proven
        fleet.wait(10 * 86_400.0)
        fleet.report("a", epoch="boot-2")
        life = fleet.life("a")
        assert (life.state, life.repairs) == (LifeState.QUARANTINED, repairs)
        assert life.reason == (
            "nothing could be tested: no torch here; mend that, then keepstep node validate a"
        )
        fleet.restart()

    ask(fleet, "a", "validate")
    assert fleet.state("a") is LifeState.VALIDATING
    fleet.validated("a", False, "matmul differs")  # a verdict is one again
    assert fleet.state("a") is LifeState.REPAIRING


def test_a_repair_that_never_ends_is_given_up_at_its_deadline() -> None:
    fleet = Fleet(policy=HOOKED)
    quarantine(fleet, "a")
    key = fleet.life("a").repair
    assert key is not None
    fleet.wait(600.0)
    fleet.restart()  # another controller sees the same repair, not a new one
    assert fleet.life("a").repair == key
    fleet.wait(2 * 600.0 + 1200.0)
    assert fleet.life("a").repairs[0].outcome is Outcome.LATE
    assert fleet.life("a").plan is Action.REBOOT


def test_without_a_hook_it_waits_for_a_person_who_may_simply_reboot_it() -> None:
    fleet = Fleet()
    quarantine(fleet, "a")
    fleet.wait(3600.0)
    assert fleet.state("a") is LifeState.QUARANTINED
    assert "no hook" in fleet.life("a").reason
    fleet.report("a", epoch="boot-2")
    assert fleet.state("a") is LifeState.VALIDATING


def test_another_machine_under_the_same_name_has_no_past() -> None:
    fleet = Fleet(policy=HOOKED, situations={"a": {"gpus": ("GPU-1",)}})
    fleet.report("a", check("gpu.row_remap_failed"), times=2)
    fleet.until(lambda: fleet.state("a") is LifeState.REPLACE, 60.0)
    fleet.situations["a"] = {"gpus": ("GPU-7",)}
    fleet.wait(1.0)
    assert fleet.state("a") is LifeState.VALIDATING
    assert fleet.life("a").entries == ()


def test_what_still_stands_after_the_repair_is_the_second_time() -> None:
    fleet = Fleet(policy=HOOKED)
    fleet.report("a", check("gpu.ecc_uncorrectable"), times=2)
    fleet.until(lambda: fleet.state("a") is LifeState.REPAIRING, 30.0)
    finish(fleet, "a", Outcome.DONE)
    fleet.report("a", check("gpu.ecc_uncorrectable"), times=30)
    assert fleet.state("a") is LifeState.VALIDATING  # probes have not looked again yet
    fleet.now += 60.0
    fleet.report("a", check("gpu.ecc_uncorrectable"), times=2)
    assert (fleet.state("a"), fleet.life("a").plan) == (LifeState.REPAIRING, Action.REBOOT)


def test_a_lost_gpu_ends_its_job_at_once_and_a_remapped_row_waits_for_its_end() -> None:
    fleet = Fleet(jobs={"a": "train"})
    fleet.report("a", xid(63))
    fleet.wait(120.0)  # others might have shown the same
    fleet.wait(6 * 86_400.0)
    assert fleet.state("a") is LifeState.CORDONED
    fleet.wait(86_400.0)
    assert fleet.state("a") is LifeState.DRAINING  # not for ever
    fleet.report("a", xid(79))
    life = fleet.life("a")
    assert life.due is not None
    assert life.due <= fleet.now


# ---------------------------------------------------------------------- the breaker


def test_the_breaker_bounds_fleet_rack_and_job_and_replays_nothing() -> None:
    nodes = tuple(f"n{number}" for number in range(100))
    racks = {node: f"r{number // 10}" for number, node in enumerate(nodes)}
    fleet = Fleet(nodes=nodes, racks=racks, jobs={node: f"j{i // 20}" for i, node in enumerate(nodes)})
    for node in nodes[::5]:
        fleet.report(node, check("gpu.temperature"), times=2)
        fleet.now += 130.0  # so that no rack and no job is to blame
    out = [node for node in nodes if not fleet.life(node).works]
    assert 5 <= len(out) <= 10
    assert max(sum(racks[node] == rack for node in out) for rack in racks.values()) == 1
    held = [node for node in nodes[::5] if node not in out]
    assert held
    assert fleet.lines("node held")
    for node in held:  # what was wrong with them is over before there is room
        fleet.report(node, times=5)
    for node in out:
        ask(fleet, node, "uncordon")
    fleet.wait(3600.0)
    assert [node for node in nodes if not fleet.life(node).works] == []


def test_the_breaker_lets_go_of_the_most_severe_first_when_there_is_room() -> None:
    fleet = Fleet(nodes=("a", "b", "c"))
    ask(fleet, "a", "cordon")
    fleet.report("b", check("gpu.temperature"), times=2)
    fleet.report("c", xid(48))
    assert fleet.life("b").works
    assert fleet.life("c").works
    fleet.wait(700.0)
    ask(fleet, "a", "uncordon")
    fleet.wait(1.0)
    assert (fleet.life("b").works, fleet.life("c").works) == (True, False)


def test_who_a_screening_finds_sick_waits_for_the_breaker() -> None:
    fleet = Fleet(nodes=("a", "b", "c"))
    fleet.report("b")
    fleet.report("c")
    for node in ("b", "c"):
        for _ in range(2):  # found by two screenings
            life = screened(fleet.life(node), "ada", "fails with a", fleet.now)
            fleet.take(Looked(lives={life.node: life}))
    fleet.until(lambda: LifeState.VALIDATING in (fleet.state("b"), fleet.state("c")), 30.0)
    states = sorted(fleet.state(node) for node in ("b", "c"))
    assert states == [LifeState.HEALTHY, LifeState.VALIDATING], states
    [held] = fleet.lines("node held")
    assert held.startswith("screening for ada: fails with a; the breaker holds")
    first = "b" if fleet.state("b") is LifeState.VALIDATING else "c"
    fleet.validated(first, passed=True)
    fleet.wait(700.0)
    other = ({"b", "c"} - {first}).pop()
    fleet.until(lambda: fleet.state(other) is LifeState.VALIDATING, 30.0)
    out = screened(fleet.life(other), "ada", "again", fleet.now)
    assert out is fleet.life(other), "it is out already"


def test_a_lemons_score_by_week() -> None:
    week = 7 * 86_400.0
    fleet = Fleet(policy=HOOKED, now=10 * week)
    assert lemon_by_week(fleet.life("a").entries, fleet.now, HOOKED.lemon, 3) == (0.0, 0.0, 0.0)
    fleet.report("a", xid(48))
    fleet.wait(2 * week)
    told = lemon_by_week(fleet.life("a").entries, fleet.now, HOOKED.lemon, 4)
    assert told == pytest.approx((0.0, 1.0, 2**-0.5, 0.5), abs=1e-4)
    assert told[-1] == lemon(fleet.life("a").entries, fleet.now, HOOKED.lemon)


def test_a_person_is_never_held() -> None:
    fleet = Fleet(nodes=("a", "b", "c"))
    for node in "abc":
        ask(fleet, node, "cordon")
    assert {fleet.state(node) for node in "abc"} == {LifeState.CORDONED}


# ---------------------------------------------------------------------- pools


def test_what_its_pool_takes_away_drains_and_is_put_back_when_it_stays() -> None:
    fleet = Fleet(nodes=("a", "b"), jobs={"a": "train"})
    ask(fleet, "b", "cordon")  # the breaker has no room, and a pool does not ask for any
    fleet.situations["a"] = {"pool": "ray", "leaves": "Ray drains it", "leaves_in_s": 90.0}
    fleet.wait(1.0)
    life = fleet.life("a")
    assert (life.state, life.owner, life.due) == (LifeState.DRAINING, "pool ray", fleet.now + 90.0)
    assert life.reason == "pool ray takes it away: Ray drains it"
    fleet.situations["a"]["leaves_in_s"] = 30.0
    fleet.wait(1.0)
    assert fleet.life("a").due == fleet.now + 30.0
    told = len(fleet.told)
    fleet.wait(1.0)
    assert len(fleet.told) == told
    fleet.situations["a"] = {"pool": "ray"}
    fleet.wait(1.0)
    assert fleet.state("a") is LifeState.HEALTHY
    assert fleet.life("a").reason == "pool ray lets it stay"


def test_a_node_of_a_pool_that_goes_empty_waits_for_its_end_and_is_not_repaired() -> None:
    fleet = Fleet(jobs={"a": "train"}, policy=HOOKED)
    fleet.situations["a"] = {"pool": "ray", "leaves": "Ray drains it"}
    fleet.wait(1.0)
    assert fleet.life("a").due == fleet.now + fleet.policy.deadlines.drain_s
    fleet.jobs.clear()
    fleet.until(lambda: fleet.state("a") is LifeState.QUARANTINED, 30.0)
    fleet.wait(3600.0)
    assert fleet.state("a") is LifeState.QUARANTINED


def test_a_persons_cordon_outlasts_a_pools_change_of_mind() -> None:
    fleet = Fleet()
    ask(fleet, "a", "cordon", who="ray", reason="fans")
    fleet.situations["a"] = {"pool": "ray", "leaves": "Ray drains it"}
    fleet.wait(1.0)
    assert (fleet.life("a").works, fleet.life("a").owner) == (False, "ray")
    fleet.situations["a"] = {"pool": "ray"}
    fleet.wait(600.0)
    assert not fleet.life("a").works


# ---------------------------------------------------------------------- people


def test_what_a_person_took_out_only_a_person_brings_back() -> None:
    fleet = Fleet()
    ask(fleet, "a", "cordon", reason="fans")
    fleet.report("a", check("gpu.lost"), times=2)
    fleet.report("a", times=10)
    fleet.wait(30 * 86_400.0)
    assert (fleet.state("a"), fleet.life("a").owner) == (LifeState.CORDONED, "ada")
    ask(fleet, "a", "uncordon", who="bob")
    assert fleet.state("a") is LifeState.HEALTHY


def test_two_operators_at_once_get_a_clear_answer() -> None:
    fleet = Fleet(jobs={"a": "train"})
    seen = fleet.life("a").revision
    ask(fleet, "a", "cordon", who="ada", reason="fans", revision=seen)
    with pytest.raises(Refused, match="changed since you looked") as refused:
        ask(fleet, "a", "drain", who="bob", revision=seen)
    assert "cordoned by ada: cordon by ada: fans" in refused.value.why
    with pytest.raises(Refused, match="already cordoned"):
        ask(fleet, "a", "cordon", who="bob")
    ask(fleet, "a", "cordon", who="ada")  # the same wish again is no news
    assert fleet.life("a").revision == seen + 1
    ask(fleet, "a", "drain", who="bob")
    with pytest.raises(Refused, match="already draining") as refused:
        ask(fleet, "a", "drain", who="ada", deadline_s=5.0)
    assert "bob was first" in refused.value.why


def test_who_puts_a_node_back_excuses_what_stands_until_it_is_over() -> None:
    fleet = Fleet()
    fleet.report("a", check("gpu.temperature"), times=2)
    ask(fleet, "a", "uncordon", who="ada")
    fleet.report("a", check("gpu.temperature"), times=50)
    fleet.restart()
    fleet.report("a", check("gpu.temperature"), times=50)
    assert fleet.state("a") is LifeState.HEALTHY
    fleet.report("a", times=5)
    fleet.now += 700.0
    assert fleet.report("a", check("gpu.temperature"), times=2).state is LifeState.SUSPECT


def test_nobody_puts_a_node_back_under_a_running_repair() -> None:
    fleet = Fleet(policy=HOOKED)
    quarantine(fleet, "a")
    with pytest.raises(Refused, match="being repaired"):
        ask(fleet, "a", "uncordon")


def test_a_person_has_a_healthy_node_validated() -> None:
    fleet = Fleet(jobs={"a": "train"})
    ask(fleet, "a", "validate")
    assert fleet.state("a") is LifeState.CORDONED
    fleet.jobs.clear()
    fleet.until(lambda: fleet.state("a") is LifeState.VALIDATING, 30.0)


def test_notes_change_nothing_else() -> None:
    fleet = Fleet()
    ask(fleet, "a", "note", reason="smells")
    assert fleet.life("a").notes[0].text == "smells"
    assert fleet.life("a").revision == 0
