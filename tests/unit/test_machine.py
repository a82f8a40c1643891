"""Several agents on one machine: each physical event is one node's."""

from keepstep.core.ids import Node
from keepstep.core.states import LifeState
from keepstep.decide.machine import Seat, own_share, shared
from keepstep.decide.triage import Counted, Report, Standing
from wards import Fleet, check, xid

NAMES = ("n1", "n2", "n10")


def say(fleet: Fleet, seats: tuple[Seat, ...], *what: Counted | Standing, epoch: str = "boot-1") -> None:
    """All agents of the machine tell the same, each in its own report, the last one first."""
    report = Report(
        epoch=epoch,
        checks=tuple(one for one in what if isinstance(one, Standing)),
        faults=tuple(one for one in what if isinstance(one, Counted)),
    )
    for seat in reversed(seats):
        fleet.say(**{seat.node: own_share(report, seat.node, seats)})
        fleet.now += 0.3


def seats_of(**gpus: str) -> tuple[Seat, ...]:
    return shared(Seat(node=Node(name), gpus=frozenset(gpus.get(name, "").split())) for name in NAMES[::-1])


def test_one_event_of_the_machine_takes_out_one_node_and_not_again_when_that_one_is_gone() -> None:
    fleet = Fleet(nodes=NAMES * 20, jobs=dict.fromkeys(NAMES, "train"))
    seats = seats_of()
    say(fleet, seats)
    for _ in range(5):
        say(fleet, seats, xid(79), check("gpu.lost"), check("host.read_only", "/data"))
    assert [name for name in NAMES if not fleet.life(name).works] == ["n1"]
    assert len(fleet.lines("node found")) == 1  # what comes with it is as bad, and no other event
    assert fleet.lines("job to blame") == []
    say(fleet, seats[1:], xid(79))
    assert fleet.state("n2") is LifeState.HEALTHY


def test_a_gpus_own_node_answers_for_it() -> None:
    fleet = Fleet(nodes=NAMES * 20, jobs=dict.fromkeys(NAMES, "train"))
    seats = seats_of(n1="GPU-0", n2="GPU-1", n10="GPU-2")
    for _ in range(3):
        say(fleet, seats, xid(48, component="GPU-2"), check("gpu.temperature", "GPU-1"))
    assert fleet.state("n10") is LifeState.DRAINING
    assert [need.component for need in fleet.life("n2").needs] == ["GPU-1"]
    assert fleet.life("n1").entries == ()


def test_what_is_the_agents_own_stays_with_it() -> None:
    report = Report(epoch="b", checks=(check("storage.slow", "/ckpt"), check("host.memory", "")))
    kept = own_share(report, Node("n2"), seats_of())
    assert [one.name for one in kept.checks] == ["storage.slow"]


def test_a_reboot_that_nobody_asked_for_is_one_nodes() -> None:
    fleet = Fleet(nodes=NAMES * 20)
    seats = seats_of()
    say(fleet, seats)
    say(fleet, seats, epoch="boot-2")
    assert [name for name in NAMES if fleet.life(name).needs] == ["n1"]
