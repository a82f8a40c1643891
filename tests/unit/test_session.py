import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from keepstep.core.beacon import BINS, PAGE, BeaconReader, BeaconWriter, Record, bin_edge_s, bin_of
from keepstep.session import Phase, Session, current, progress


@pytest.fixture
def beacon(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A page as the shim makes it, announced in the environment."""
    descriptor = os.memfd_create("keepstep-beacon")
    os.ftruncate(descriptor, PAGE)
    monkeypatch.setenv("KEEPSTEP_BEACON_FD", str(descriptor))
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    progress._opened.cache_clear()
    yield descriptor
    progress._opened.cache_clear()
    os.close(descriptor)


def read(descriptor: int) -> Record:
    record = BeaconReader.of_descriptor(descriptor).read()
    assert record is not None
    return record


def test_marks_reach_the_page(beacon: int) -> None:
    session = current()
    assert session.attached and (session.rank, session.world_size) == (5, 8)
    assert read(beacon).phase is Phase.STARTING and read(beacon).step == -1

    before = time.monotonic_ns()
    session.phase(Phase.FORWARD, micro_batch=3)
    session.wait("dp", 40)
    session.go_on()
    session.wait("tp.1234567890abcdef", 41, peer=7)
    session.batch()
    session.stalled(1000)
    session.stalled(500)
    session.checkpointed(10)
    seen = read(beacon)
    assert (seen.phase, seen.micro_batch, seen.peer) == (Phase.FORWARD, 3, 7)
    session.step_done(12)

    seen = read(beacon)
    assert (seen.phase, seen.peer) == (Phase.NONE, -1), "what comes after a step is anybody's guess"
    assert (seen.group, seen.group_sequence) == ("tp.1234567890ab", 41)
    assert (seen.launched, seen.completed, seen.stall_ns, seen.batches) == (2, 1, 1500, 1)
    assert 0 < seen.wait_ns < time.monotonic_ns() - before and seen.waiting_ns == 0
    assert (seen.step, seen.checkpoint_step) == (12, 10)
    assert before <= seen.phase_ns <= seen.step_ns <= time.monotonic_ns()


def test_completed_phases_are_counted_with_what_they_waited(beacon: int) -> None:
    session = current()
    for _ in range(3):
        session.phase(Phase.FORWARD)
        session.phase(Phase.BACKWARD)
        session.wait("dp")
        session.phase(Phase.OPTIMIZER)
    seen = BeaconReader.of_descriptor(beacon).phases()
    assert {phase: row.count for phase, row in seen.items()} == {
        Phase.STARTING: 1, Phase.FORWARD: 3, Phase.BACKWARD: 3, Phase.OPTIMIZER: 2,
    }  # fmt: skip
    backward = seen[Phase.BACKWARD]
    assert 0 < backward.waited_ns < backward.total_ns and backward.longest_ns <= backward.total_ns
    assert sum(backward.bins) == 3 and read(beacon).waiting_ns == 0
    assert seen[Phase.FORWARD].waited_ns == 0


def test_what_was_waited_for_a_pipeline_stands_beside_all_that_was_waited(beacon: int) -> None:
    session, reader = current(), BeaconReader.of_descriptor(beacon)
    session.phase(Phase.FORWARD)
    session.wait("tp")
    session.go_on()
    assert reader.bubble_ns() == 0
    session.wait("pp", 3, peer=1)
    session.go_on()
    first = reader.bubble_ns()
    session.wait("pp", 4, peer=1)
    session.phase(Phase.BACKWARD)
    waited = reader.phases()[Phase.FORWARD].waited_ns
    assert 0 < first < reader.bubble_ns() < waited


def test_bins_are_half_octaves_and_a_full_one_ages_them_all() -> None:
    for k in range(BINS - 1):
        edge = round(bin_edge_s(k) * 1e9)
        assert (bin_of(edge - 1), bin_of(edge)) == (k, k + 1)
    assert bin_edge_s(BINS - 1) == math.inf and bin_of(1 << 60) == BINS - 1
    page = mmap.mmap(-1, PAGE)
    writer = BeaconWriter(page, rank=0, world_size=1)
    writer.passed(Phase.DATA, 1)
    for _ in range(0x10000):
        writer.passed(Phase.DATA, 3 << 20)
    row = BeaconReader(page).phases()[Phase.DATA]
    assert row.count == 0x10001 and row.bins[0] == 0 and row.bins[bin_of(3 << 20)] == 0x8000


def test_figures_go_to_the_ring_and_what_is_unknown_is_left_out(beacon: int) -> None:
    session = current()
    session.step_done(1)
    session.step_done(2, loss=2.5, tokens_per_s=1000.0)
    session.step_done(3, loss=math.nan)
    points = BeaconReader.of_descriptor(beacon).points(0)
    assert [point.step for point in points] == [2, 3]
    assert points[0].loss == 2.5 and points[0].tokens_per_s == 1000.0 and math.isnan(points[0].mfu)
    assert math.isnan(points[1].loss)


def test_resuming_is_not_a_step(beacon: int) -> None:
    session = current()
    session.resumed(60)
    assert read(beacon).step == 60 and read(beacon).step_ns == 0


def test_one_session_a_process(beacon: int) -> None:
    assert current() is current()


def test_outside_of_keepstep_marks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEEPSTEP_BEACON_FD", raising=False)
    progress._opened.cache_clear()
    session = current()
    session.phase(Phase.BACKWARD)
    session.step_done(3, loss=1.0)
    assert not session.attached
    progress._opened.cache_clear()


def test_another_file_under_the_number_is_left_alone(
    beacon: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path_factory.mktemp("own") / "data"
    path.write_bytes(b"x" * PAGE)
    with path.open("r+b") as file:
        monkeypatch.setenv("KEEPSTEP_BEACON_FD", str(file.fileno()))
        progress._opened.cache_clear()
        current().phase(Phase.DATA)
    assert path.read_bytes() == b"x" * PAGE


def test_a_forked_worker_does_not_speak_for_the_rank(beacon: int) -> None:
    current().step_done(4)
    child = os.fork()
    if child == 0:
        session = current()
        session.step_done(99)
        os._exit(7 if session.attached else 0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert read(beacon).step == 4


def test_a_second_program_of_the_rank_goes_on_where_the_first_ended(beacon: int) -> None:
    """A launcher script may run one program after the other: the dead one's page is taken over."""
    program = "from keepstep.session import current; s = current(); s.step_done(1); s.step_done({step})"
    for step in (5, 6):
        subprocess.run(
            [sys.executable, "-c", program.format(step=step)], pass_fds=[beacon], check=True, timeout=60
        )
        assert read(beacon).step == step


def test_imports_neither_torch_nor_third_party_packages() -> None:
    program = (
        "import sys; before = set(sys.modules); import keepstep.session;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - sys.stdlib_module_names - {'keepstep'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_a_mark_is_cheap() -> None:
    """About a microsecond; the bound is wide enough for a busy machine and catches a system call a mark."""
    session = Session(mmap.mmap(-1, PAGE), rank=0, world_size=1, attached=True)
    best_us = math.inf
    for _ in range(20):
        start = time.perf_counter_ns()
        for _ in range(200):
            session.phase(Phase.FORWARD, 1)
        best_us = min(best_us, (time.perf_counter_ns() - start) / 200 / 1e3)
    assert best_us < 5
