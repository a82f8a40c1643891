"""Every row of the XID table, and what is none of it. Time is virtual, the policy the shipped one."""

from dataclasses import replace

import pytest

from keepstep.core.rules import Action, Class
from keepstep.core.states import LifeState
from keepstep.decide.life import Outcome, Repair
from keepstep.decide.triage import Report
from keepstep.spec.rules import load_rules
from wards import XIDS, Fleet, check, xid

STATES = {
    "restart the application": LifeState.HEALTHY,
    "watch": LifeState.HEALTHY,
    "validate when idle": LifeState.CORDONED,
    "reset when idle": LifeState.CORDONED,
    "drain and reset": LifeState.DRAINING,
    "reboot": LifeState.DRAINING,
    "replace": LifeState.DRAINING,
}


COMPARED_S = load_rules().correlation.within_s  # what does not drain waits for others to show the same


def put_back(fleet: Fleet, node: str) -> None:
    """As a repair and its validation would: well again, with all that is remembered."""
    life = fleet.life(node)
    fleet.ward.lives[life.node] = replace(
        life, state=LifeState.HEALTHY, needs=(), stands={}, plan=Action.NOTHING, out_at=fleet.now
    )
    fleet.now += 3600.0


@pytest.mark.parametrize("code", XIDS)
def test_each_row_of_the_xid_table(code: int) -> None:
    of, actions = XIDS[code]
    rule = load_rules().rule("xid", code)
    assert rule is not None
    assert rule.of is Class(of)
    fleet = Fleet(jobs={"a": "train"})
    for times in range(1, 4):
        fleet.told.clear()
        life = fleet.report("a", xid(code, count=times))
        if not actions:
            assert life.entries == ()
            assert life.state is LifeState.HEALTHY
            continue
        action = actions[min(times, len(actions)) - 1]
        [line] = fleet.lines("node found")
        assert line.startswith(f"XID {code} on GPU-1")
        assert line.endswith(action)
        fleet.wait(COMPARED_S)
        assert fleet.state("a") is STATES[action]
        put_back(fleet, "a")


def test_the_shipped_policy_names_every_xid_once() -> None:
    codes = [code for rule in load_rules().rules for code in rule.xids]
    assert sorted(codes) == sorted(XIDS)


def test_an_xid_that_nobody_knows_does_nothing() -> None:
    assert Fleet().report("a", xid(999)).entries == ()


def test_the_recovery_action_is_obeyed_and_unknown_ones_mean_drain() -> None:
    for value, state, plan in (
        (1.0, LifeState.DRAINING, Action.RESET),
        (2.0, LifeState.DRAINING, Action.REBOOT),
        (3.0, LifeState.DRAINING, Action.RESET),
        (4.0, LifeState.DRAINING, Action.RESET),
        (77.0, LifeState.DRAINING, Action.RESET),
        (0.0, LifeState.HEALTHY, Action.NOTHING),
    ):
        fleet = Fleet(jobs={"a": "train"})
        life = fleet.report("a", check("gpu.recovery_action", value=value), times=2)
        assert (life.state, life.plan) == (state, plan), value


def test_a_recovery_action_that_grows_is_obeyed_anew() -> None:
    fleet = Fleet(jobs={"a": "train"})
    fleet.report("a", check("gpu.recovery_action", value=1.0), times=2)
    assert fleet.report("a", check("gpu.recovery_action", value=2.0), times=2).plan is Action.REBOOT


def test_a_gpu_that_is_lost_without_any_xid() -> None:
    fleet = Fleet(jobs={"a": "train"})
    assert fleet.report("a", check("gpu.lost")).state is LifeState.HEALTHY  # one report is none
    life = fleet.report("a", check("gpu.lost"))
    assert (life.state, life.plan, life.due) == (LifeState.DRAINING, Action.REBOOT, fleet.now - 1.0)


# ---------------------------------------------------------------------- once


def test_a_count_that_jumps_by_a_million_is_one_decision() -> None:
    fleet = Fleet(jobs={"a": "train"})
    life = fleet.report("a", xid(13, count=1_000_000))
    assert [(entry.action, entry.count) for entry in life.entries] == [(Action.RESTART, 1_000_000)]
    assert len(fleet.lines("node found")) == 1


def test_a_flood_over_minutes_is_one_event_and_a_flood_without_end_is_not() -> None:
    fleet = Fleet(jobs={"a": "train"})
    for count in range(1, 500):
        fleet.report("a", xid(13, count=count * 1000))
    assert len(fleet.lines("node found")) == 1
    for count in range(500, 700):
        fleet.report("a", xid(13, count=count * 1000))
    assert len(fleet.lines("node found")) == 2
    fleet.wait(COMPARED_S)
    assert fleet.state("a") is LifeState.CORDONED


@pytest.mark.parametrize("what", [xid(63), check("gpu.throttled"), check("gpu.row_remap_pending")])
def test_neither_a_controllers_nor_an_agents_restart_acts_again(what: object) -> None:
    fleet = Fleet(jobs={"a": "train"})
    before = fleet.report("a", what, times=3)  # type: ignore[arg-type]
    told = len(fleet.told)
    fleet.restart()
    fleet.report("a", times=2)  # an agent that has just started knows nothing yet
    after = fleet.report("a", what, times=5)  # type: ignore[arg-type]
    assert after.entries == before.entries
    assert len(fleet.told) == told


def test_an_agent_that_reads_the_kernels_log_again_counts_the_same() -> None:
    fleet = Fleet()
    fleet.report("a", xid(48, count=3))
    fleet.restart()
    fleet.report("a", xid(48, count=1))
    fleet.report("a", xid(48, count=3, age_s=500.0))
    assert len(fleet.lines("node found")) == 1


def test_what_a_fresh_agent_tells_of_the_past_is_never_acted_upon() -> None:
    fleet = Fleet(jobs={"a": "train"})
    old = xid(48, count=3, age_s=7200.0)
    assert fleet.report("a", old).state is LifeState.HEALTHY
    [line] = fleet.lines("node past")
    assert line == "from before it was watched, not acted upon: XID 48 on GPU-1, 2.0 h ago"
    fleet.restart()
    fleet.report("a", old, times=3)
    assert len(fleet.told) == 1
    assert fleet.report("a", xid(48, count=4)).state is LifeState.DRAINING


def test_what_happened_while_no_controller_watched_is_not_the_past() -> None:
    fleet = Fleet(jobs={"a": "train"})
    fleet.report("a")
    fleet.restart()
    fleet.now += 3600.0
    late = xid(48, age_s=1800.0)
    fleet.say(a=Report(epoch="boot-1", faults=(late,), first=True, unwatched_s=3600.0))
    assert fleet.state("a") is LifeState.DRAINING


def test_a_hung_gpu_that_is_known_by_its_index_only_may_be_the_one_of_before() -> None:
    fleet = Fleet(jobs={"a": "train"})
    assert fleet.report("a", check("gpu.hung", "GPU-1"), times=2).plan is Action.REBOOT
    put_back(fleet, "a")
    assert fleet.report("a", check("gpu.hung", "1"), times=2).plan is Action.REPLACE


def test_an_xid_79_and_what_follows_it_are_one_event() -> None:
    fleet = Fleet(jobs={"a": "train"})
    fleet.report("a", xid(20034, component="switch-0", kind="sxid"))
    assert fleet.life("a").plan is Action.RESET
    life = fleet.report(
        "a", xid(20034, component="switch-0", kind="sxid"), xid(79), check("gpu.lost"), times=4
    )
    assert life.plan is Action.REBOOT
    assert [entry.rule for entry in life.entries] == ["NVSwitch", "GPU off the bus"]


def test_a_new_boot_counts_from_nothing_and_what_its_counts_said_is_gone() -> None:
    fleet = Fleet(nodes=("a", *"bcdefghijkl"))
    fleet.report("b", check("gpu.throttled"), times=2)  # the breaker is full: one of twelve
    assert fleet.report("a", xid(48, count=4)).state is LifeState.HEALTHY
    assert fleet.life("a").needs != ()
    life = fleet.report("a", epoch="boot-2")
    assert all(need.action is Action.DIAGNOSE for need in life.needs)
    assert fleet.lines("node found")[-1].startswith("an unexpected boot")
    fleet.now += 120.0
    fleet.report("a", xid(48, count=1), epoch="boot-2")
    assert "XID 48" in fleet.lines("node found")[-1]


def test_the_boot_that_nobody_saw_is_not_held_against_a_node() -> None:
    fleet = Fleet()
    fleet.report("a", xid(13))
    fleet.restart()
    fleet.say(a=Report(epoch="boot-2", first=True))
    assert fleet.state("a") is LifeState.HEALTHY
    assert len(fleet.told) == 1


# ---------------------------------------------------------------------- levels


def test_two_bad_reports_to_leave_and_five_good_ones_to_return() -> None:
    fleet = Fleet()
    assert fleet.report("a", check("gpu.temperature")).state is LifeState.HEALTHY
    assert fleet.report("a", check("gpu.temperature")).state is LifeState.SUSPECT
    fleet.report("a", times=4)
    fleet.report("a", check("gpu.temperature"))
    fleet.report("a", times=4)
    assert fleet.life("a").needs != ()
    fleet.report("a")
    assert fleet.life("a").needs == ()
    assert fleet.state("a") is LifeState.SUSPECT  # for half an hour at least
    fleet.wait(1800.0)
    assert fleet.state("a") is LifeState.HEALTHY


def test_a_sensor_that_flaps_below_the_threshold_does_nothing() -> None:
    fleet = Fleet()
    for _ in range(500):
        fleet.report("a", check("gpu.temperature"))
        fleet.report("a")
    assert fleet.told == []


def test_a_warning_is_not_bad() -> None:
    fleet = Fleet()
    assert fleet.report("a", check("gpu.lost", level="warn"), times=10).entries == ()


def test_fewer_than_a_rule_needs_are_only_noted() -> None:
    fleet = Fleet()
    for count in (1, 2):
        assert fleet.report("a", xid(0, count, "sda", kind="io_error")).needs == ()
        fleet.now += 200.0
    fleet.report("a", xid(0, 3, "sda", kind="io_error"))
    assert "io error on sda" in fleet.lines("node found")[0]
    slow = Fleet()
    for count in range(1, 8):
        slow.report("a", xid(0, count, "sda", kind="io_error"))
        slow.now += 700.0
    assert slow.told == []


def test_watched_things_that_add_up_make_a_node_suspect_until_they_fade() -> None:
    fleet = Fleet()
    for count in range(1, 4):
        fleet.report("a", xid(92, count))
        fleet.now += 120.0
    assert fleet.state("a") is LifeState.HEALTHY  # the first ones weigh a little less already
    fleet.report("a", xid(92, 4))
    assert fleet.state("a") is LifeState.SUSPECT
    fleet.until(lambda: fleet.state("a") is LifeState.HEALTHY, 600.0)
    assert 6 * 3600 <= fleet.now <= 12 * 3600


def test_three_repairs_in_a_week_are_the_last() -> None:
    fleet = Fleet(jobs={"a": "train"})
    fleet.report("a", xid(48, component="GPU-0"))
    put_back(fleet, "a")
    done = [
        Repair(key=str(n), action=Action.RESET, at=fleet.now - 86_400.0 * n, outcome=Outcome.DONE)
        for n in (3, 2, 1)
    ]
    life = fleet.life("a")
    fleet.ward.lives[life.node] = replace(life, repairs=tuple(done[1:]))
    assert fleet.report("a", xid(95, component="GPU-1")).plan is Action.RESET
    put_back(fleet, "a")
    fleet.ward.lives[life.node] = replace(fleet.life("a"), repairs=tuple(done))
    assert fleet.report("a", xid(119, component="GPU-2")).plan is Action.REPLACE
    assert "3 repairs in 7 days" in fleet.life("a").reason


# ---------------------------------------------------------------------- whose fault


def test_several_gpus_of_one_job_are_the_jobs_fault() -> None:
    fleet = Fleet(nodes=("a", "b"), jobs={"a": "train", "b": "train"})
    fleet.report("a", xid(31))
    fleet.report("b", xid(31, component="GPU-9"))
    assert "2 GPUs of train" in fleet.lines("job to blame")[0]
    fleet.now += 3600.0
    fleet.report("a", xid(31, count=2))  # that first one is not held against it
    assert fleet.state("a") is LifeState.HEALTHY
    fleet.now += 3600.0
    fleet.report("a", xid(31, count=3))
    fleet.wait(COMPARED_S)
    assert fleet.state("a") is LifeState.CORDONED


def test_one_xid_on_many_nodes_of_a_job_is_the_job_and_drains_are_taken_back() -> None:
    nodes = tuple("abcdefgh")
    fleet = Fleet(nodes=nodes, jobs=dict.fromkeys(nodes, "train"))
    fleet.report("a", xid(48))
    assert fleet.state("a") is LifeState.DRAINING
    fleet.report("b", xid(48))
    fleet.now += 60.0
    fleet.report("c", xid(48))
    assert {fleet.state(node) for node in nodes} == {LifeState.HEALTHY}
    assert len(fleet.lines("job to blame")) == 1
    assert {entry.blamed for node in "abc" for entry in fleet.life(node).entries} == {"job:train"}


def test_other_jobs_nodes_and_later_ones_do_not_count() -> None:
    nodes = tuple("abcdef")
    fleet = Fleet(nodes=nodes * 10, jobs={"a": "one", "b": "two", "c": "one", "d": "one"})
    for node in "abcd":
        fleet.report(node, xid(48))
        fleet.now += 130.0
    assert fleet.lines("job to blame") == []


def test_many_nodes_of_a_rack_are_the_rack_until_one_is_left_over() -> None:
    nodes = tuple("abcdefgh")
    fleet = Fleet(nodes=nodes * 20, racks=dict.fromkeys(nodes, "r7"))
    for node in "abcd":
        fleet.report(node, check("network.link_down", "eth0"), times=2)
    assert {fleet.state(node) for node in "abcd"} == {LifeState.HEALTHY}
    assert "4 nodes" in fleet.lines("rack to blame")[0] or "3 nodes" in fleet.lines("rack to blame")[0]
    for node in "abc":  # the switch is back, but one cable is really broken
        fleet.report(node, times=5)
    fleet.now += 300.0
    fleet.report("d", check("network.link_down", "eth0"))
    fleet.wait(COMPARED_S)
    assert fleet.state("d") is not LifeState.HEALTHY
    assert {fleet.state(node) for node in "abc"} == {LifeState.HEALTHY}
