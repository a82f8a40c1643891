"""What an agent's looks find of ranks: real processes, and beacons that move or do not."""

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from keepstep.agent.pulse import Pulses, bubble_s, phases, spent
from keepstep.agent.rank import processes
from keepstep.agent.rank.protocol import RankState
from keepstep.control.pace import Paces
from keepstep.core.beacon import BINS, PAGE, BeaconReader, BeaconWriter, Phase, Trouble
from keepstep.core.durations import COMPUTING_FLOOR_S, SILENT_FACTOR, Usual, bound_s, waiting_bound_s
from keepstep.session import Session
from keepstep.wire.messages import RankStatus


class Rank:
    """A child that sleeps, with a page that this test writes for it."""

    def __init__(self) -> None:
        self.child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.page = mmap.mmap(-1, PAGE)
        self.session = Session(self.page, rank=0, world_size=1, attached=False)
        self.reader, self.pulses = BeaconReader(self.page), Pulses()

    def look(self, elapsed_s: float = 0.25) -> bool:
        record = self.reader.read()
        assert record is not None
        state = RankState(rank=0, local_rank=0, state="running", pid=self.child.pid)
        return self.pulses.look([state], {0: self.reader}, {0: record}, elapsed_s)

    def until(self, state: str) -> None:
        """The kernel takes a moment to stop a process."""
        while (process := processes.read(self.child.pid)) is not None and process.state != state:
            os.sched_yield()


@pytest.fixture
def rank() -> Iterator[Rank]:
    found = Rank()
    yield found
    found.child.kill()
    found.child.communicate()


def test_a_stopped_process_is_told_at_once_and_again_when_a_second_look_agrees(rank: Rank) -> None:
    assert not rank.look() and rank.pulses.ranks[0].process in {"running", "blocked"}
    os.kill(rank.child.pid, signal.SIGSTOP)
    rank.until("T")
    assert rank.look(), "seen"
    assert (rank.pulses.ranks[0].process, rank.pulses.ranks[0].process_s) == ("stopped", 0.0)
    assert rank.look(), "confirmed"
    assert rank.pulses.ranks[0].process_s == 0.25
    assert not rank.look(), "the rest is for the next report"
    os.kill(rank.child.pid, signal.SIGCONT)
    rank.until("S")
    assert rank.look() and rank.pulses.ranks[0].process in {"running", "blocked"}


def test_a_late_look_proves_little(rank: Rank) -> None:
    os.kill(rank.child.pid, signal.SIGSTOP)
    rank.until("T")
    rank.look()
    rank.look(60.0)
    assert rank.pulses.ranks[0].process_s == 0.0, "it may have been stopped together with this agent"
    assert rank.pulses.ranks[0].still_s <= 0.75


def test_a_node_that_stands_longer_than_its_phase_ever_took_is_told_with_every_look(rank: Rank) -> None:
    for _ in range(100):
        rank.session.phase(Phase.FORWARD)
    bound = bound_s(Phase.FORWARD, Usual.of(rank.reader.phases()[Phase.FORWARD]))
    assert bound is not None and bound < 2 * COMPUTING_FLOOR_S
    told = [rank.look() for _ in range(int(2 * COMPUTING_FLOOR_S / 0.25) + 2)]
    assert not any(told[: int(COMPUTING_FLOOR_S / 0.25)]) and told[-1]
    rank.session.phase(Phase.BACKWARD)
    assert rank.look(), "it goes on after all"
    assert not rank.look()


def test_it_is_told_at_either_bound_not_in_between(rank: Rank) -> None:
    writer = BeaconWriter(rank.page, rank=0, world_size=1)
    for _ in range(100):
        writer.passed(Phase.FORWARD, 1_000_000_000)
    rank.session.phase(Phase.FORWARD)
    usual = Usual.of(rank.reader.phases()[Phase.FORWARD])
    waiting, full = waiting_bound_s(Phase.FORWARD, usual, SILENT_FACTOR), bound_s(Phase.FORWARD, usual)
    assert waiting is not None and full is not None and waiting + 3.5 < full
    told: dict[float, bool] = {}
    while not told or max(told) < full + 1:
        urgent = rank.look()
        told[rank.pulses.ranks[0].still_s] = urgent
    quiet = [at for at, urgent in told.items() if not urgent]
    assert not any(waiting < at <= waiting + 3 or at >= full for at in quiet)
    assert {at for at in told if at < waiting - 0.25 or waiting + 3.25 < at < full} <= set(quiet)


def test_a_phase_without_a_name_is_never_suspicious(rank: Rank) -> None:
    for step in range(100):
        rank.session.phase(Phase.FORWARD)
        rank.session.step_done(step)
    assert not any(rank.look() for _ in range(400))


def test_where_the_time_went(rank: Rank) -> None:
    for _ in range(3):
        rank.session.phase(Phase.DATA)
        rank.session.phase(Phase.FORWARD)
        rank.session.wait("dp")
    rank.session.step_done(3)
    where = spent(rank.child.pid, rank.reader)
    assert 0 < where.own_s < where.passed_s and 0 < where.data_s < where.passed_s
    told = {seen.phase: seen for seen in phases([rank.reader, rank.reader])}
    assert (told["forward"].count, told["forward"].ranks) == (6, 2)
    assert sum(told["forward"].bins) == 6 and len(told["forward"].bins) == BINS
    assert bubble_s([rank.reader]) == 0
    rank.session.wait("pp")
    rank.session.go_on()
    assert bubble_s([rank.reader, rank.reader]) == 2 * rank.reader.bubble_ns() / 1e9 > 0


def test_the_graver_trouble_stays(rank: Rank) -> None:
    rank.session.step_done(7, loss=float("nan"))
    record = rank.reader.read()
    assert record is not None and (record.trouble, record.trouble_step) == (Trouble.NOT_FINITE, 7)
    rank.session.trouble(Trouble.STATE_CHANGED, 8)
    rank.session.trouble(Trouble.NOT_FINITE_HERE, 9)
    record = rank.reader.read()
    assert record is not None and (record.trouble, record.trouble_step) == (Trouble.STATE_CHANGED, 8)


def test_garbage_that_is_collected_within_a_phase_is_no_time_of_its_own(rank: Rank) -> None:
    writer = BeaconWriter(rank.page, rank=0, world_size=1)
    writer.passed(Phase.FORWARD, 3_000_000_000)
    writer.passed(Phase.COLLECTING, 1_000_000_000)
    found = spent(rank.child.pid, rank.reader)
    assert (found.passed_s, found.own_s, found.collected_s) == (3.0, 3.0, 1.0)


def test_a_pace_knows_the_least_that_was_waited() -> None:
    paces, wait_s = Paces(), 0.0
    for step in range(0, 100, 2):
        wait_s += 2 * (0.1 if step < 40 else 0.4)
        paces.hear(
            RankStatus(
                rank=0, local_rank=0, state="running", step=step, passed_s=float(step), wait_s=wait_s
            )
        )  # fmt: skip
    pace = paces.of(0)
    assert pace is not None
    assert pace.waited_s == pytest.approx(0.4) and pace.waited_least_s == pytest.approx(0.1)
