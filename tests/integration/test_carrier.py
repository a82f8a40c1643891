"""Carriers as they run: memory files over a Unix socket, copies over TCP, kills, torn and corrupt slots."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from carriers import (
    DESCRIPTION,
    PAYLOAD,
    WITHIN_S,
    Node,
    agree,
    content,
    nodes,
    protect,
    restore,
    take,
    until,
)
from keepstep.agent.rank import processes
from keepstep.core import snapshots
from keepstep.core.cadence import STEPS_MAX
from keepstep.core.errors import Refused
from keepstep.core.snapshots import Stamp


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Node]]:
    with nodes(tmp_path, "a", "b") as found:
        yield found


def wanted(world: int, at: tuple[int, int], ranks: dict[int, list[str]]) -> dict[str, Any]:
    return {"world": world, "at": list(at), "wanted": [[rank, nodes] for rank, nodes in ranks.items()]}


def test_a_rank_finds_its_snapshot_again(tmp_path: Path) -> None:
    with nodes(tmp_path, "a") as (a,):
        slots = a.slots(0, world=1, attempt=1)
        for step in (1, 2, 3, 4):
            agree(slots)
            assert take(slots, step)
        a.prepare(2, {2: (1, 4)}, [0], world=1, memory=wanted(1, (1, 4), {0: ["a"]}))
        again = a.slots(0, world=1, attempt=2)
        assert again.resume(4)
        assert restore(again, 0, world=1, at=(1, 4)) == content(0, 4)
        assert (0, 2, 4, True) in a.held()


def test_a_buddy_keeps_a_copy_from_which_a_lost_node_is_replaced(tmp_path: Path) -> None:
    with nodes(tmp_path, "a", "b") as (a, b):
        ranks = [a.slots(0, world=2, attempt=1), b.slots(1, world=2, attempt=1)]
        for step in (1, 2):
            agree(*ranks)
            assert all(take(slots, step) for slots in ranks)
        protect(*ranks, step=2)
        assert (0, 1, 2, False) in b.held()
        a.kill()
        c = Node(tmp_path, "c")
        try:
            c.meet(b, buddy="b")
            memory = wanted(2, (1, 2), {0: ["b"]})
            c.prepare(2, {2: (1, 2)}, [0], world=2, memory=memory)
            b.prepare(2, {2: (1, 2)}, [1], world=2, memory=wanted(2, (1, 2), {1: ["b"]}))
            slots = c.slots(0, world=2, attempt=2)
            assert slots.resume(2)
            assert restore(slots, 0, world=2, at=(1, 2)) == content(0, 2)
            protect(slots, step=2)  # b's copy was stamped anew, too
        finally:
            c.end()


def test_a_killed_carrier_costs_copies_only(pair: list[Node]) -> None:
    a, b = pair
    ranks = [a.slots(0, world=2, attempt=1), b.slots(1, world=2, attempt=1)]
    agree(*ranks)
    assert all(take(slots, 1) for slots in ranks)
    protect(*ranks, step=1)
    a.kill()
    agree(*ranks)
    assert all(take(slots, 2) for slots in ranks), "a rank goes on without its carrier"
    a.start()
    for node in pair:
        node.meet(a, b, buddy="b" if node is a else "a")
    step = 2
    deadline = time.monotonic() + WITHIN_S
    while (0, 1, step, True) not in a.held():
        assert time.monotonic() < deadline
        agree(*ranks)
        step += all(take(slots, step + 1) for slots in ranks)
    assert {(0, 1, step, True), (0, 1, step - 1, True)} <= a.held(), "the rank handed its file over"
    protect(*ranks, step=step)
    assert (0, 1, step, False) in b.held()
    assert (1, 1, step, False) in a.held()


def test_many_ranks_share_one_way_to_the_buddy(pair: list[Node]) -> None:
    """They come one after the other, each with something to send."""
    a, b = pair
    ranks = []
    for rank in range(4):
        slots = a.slots(rank, world=8, attempt=1)
        agree(slots)
        assert take(slots, 1)
        ranks.append(slots)
    b.kill()
    b.start()  # it asks for all of them anew
    for node in pair:
        node.meet(a, b, buddy="b" if node is a else "a")
    copies = {(rank, 1, 1, False) for rank in range(4)}
    until(lambda: copies <= b.held(), "the copies of all four")


def test_all_ranks_keep_the_same_steps_however_much_it_costs_one_of_them(pair: list[Node]) -> None:
    a, b = pair
    ranks = [a.slots(0, world=2, attempt=1), b.slots(1, world=2, attempt=1)]
    for step in (1, 2):
        agree(*ranks)
        assert [slots.due(step) for slots in ranks] == [True, True]
        assert all(take(slots, step) for slots in ranks)
    ranks[1].stalled(10.0)
    agree(*ranks)
    assert [slots.due(3) for slots in ranks] == [False, False]
    assert [slots.due(2 + STEPS_MAX) for slots in ranks] == [True, True]


def test_the_carrier_tells_what_sending_takes(pair: list[Node]) -> None:
    a, b = pair
    slots = a.slots(0, world=2, attempt=1)
    agree(slots)
    assert take(slots, 1)
    protect(slots, step=1)
    until(lambda: snapshots.read_send(slots._memory) > 0, "its word")
    b.kill()
    a.meet(a)
    until(lambda: snapshots.read_send(slots._memory) == 0, "nobody to send to")


def test_what_is_on_its_way_is_not_overwritten(pair: list[Node]) -> None:
    a, b = pair
    b.kill()  # rank 0's buddy takes nothing
    slots = a.slots(0, world=1, attempt=1)
    for step in range(1, 8):
        agree(slots)
        assert slots.says[0] < 0
        assert take(slots, step)
    assert {step for _, _, step, _ in a.held()} >= {1, 6, 7}


def test_little_memory_means_three_slots_and_skipped_snapshots(pair: list[Node]) -> None:
    a, b = pair
    a.meet(a, b, buddy="b", bytes_max=10 << 20)
    b.kill()
    slots = a.slots(0, world=1, attempt=1)
    taken = []
    for step in range(1, 8):
        agree(slots)
        if slots.says[0] < 0 and take(slots, step):
            taken.append(step)
    assert taken == [1, 2, 3]


def test_a_buddy_without_memory_is_none(pair: list[Node]) -> None:
    """A rank goes on, and is not held up by copies that nobody can keep."""
    a, b = pair
    b.meet(a, b, bytes_max=1 << 20)
    slots = a.slots(0, world=2, attempt=1)
    agree(slots)
    assert take(slots, 1)
    protect(slots, step=1)
    assert b.held() == set()


def test_a_corrupt_slot_is_refused_and_the_copy_is_used(pair: list[Node]) -> None:
    a, b = pair
    ranks = [a.slots(0, world=2, attempt=1), b.slots(1, world=2, attempt=1)]
    agree(*ranks)
    assert all(take(slots, 1) for slots in ranks)
    protect(*ranks, step=1)
    ranks[0].payload(0)[12345] ^= 1
    a.prepare(2, {2: (1, 1)}, [0], world=2, memory=wanted(2, (1, 1), {0: ["a", "b"]}))
    slots = a.slots(0, world=2, attempt=2)
    assert restore(slots, 0, world=2, at=(1, 1)) == content(0, 1)


def test_a_corrupt_slot_without_a_copy_is_said_and_the_older_one_is_left(tmp_path: Path) -> None:
    with nodes(tmp_path, "a") as (a,):
        slots = a.slots(0, world=1, attempt=1)
        for step in (1, 2):
            agree(slots)
            assert take(slots, step)
        slots.payload(1)[0] ^= 1
        with pytest.raises(Refused, match="step 2 of rank 0 is not in memory any more"):
            a.prepare(2, {2: (1, 2)}, [0], world=1, memory=wanted(1, (1, 2), {0: ["a"]}))
        assert a.held() == {(0, 1, 1, True)}
        a.prepare(3, {2: (1, 2), 3: (1, 1)}, [0], world=1, memory=wanted(1, (1, 1), {0: ["a"]}))
        assert restore(a.slots(0, world=1, attempt=3), 0, world=1, at=(1, 1)) == content(0, 1)


def test_a_torn_slot_counts_for_nothing(tmp_path: Path) -> None:
    with nodes(tmp_path, "a") as (a,):
        slots = a.slots(0, world=1, attempt=1)
        agree(slots)
        assert take(slots, 1)
        agree(slots)
        assert slots.begin(2) is not None  # and the rank dies in the middle of its copy
        assert a.held() == {(0, 1, 1, True)}
        _, files = slots._carrier.ask(do="join", rank=0, world=1, attempt=1, **maxima())
        start, record = snapshots.slot_record(1, snapshots.Slot(at=Stamp(1, 2)), 77)
        os.pwrite(files[0], record[:-8] + bytes(8), start)  # a record that was written by half
        os.close(files[0])
        assert a.held() == {(0, 1, 1, True)}


def maxima() -> dict[str, Any]:
    return {"description_max": DESCRIPTION, "payload_max": PAYLOAD}


def test_a_replaced_attempt_is_shut_out(pair: list[Node]) -> None:
    a, b = pair
    slots = a.slots(0, world=2, attempt=1)
    agree(slots)
    assert take(slots, 1)
    protect(slots, step=1)
    b.prepare(2, {2: (1, 1)}, [1], world=2, memory=wanted(2, (1, 1), {}))
    agree(slots)
    assert take(slots, 2)  # a late rank of attempt 1, on a node that knows of nothing
    a.ask(do="hello")
    with pytest.raises(Refused, match="replaced by attempt 2"):
        b.ask(do="join", rank=1, world=2, attempt=1, **maxima())
    assert (0, 1, 2, False) not in b.held()
    assert (0, 2, 1, False) in b.held()


def test_a_stranger_is_not_answered(pair: list[Node]) -> None:
    a, b = pair
    slots = a.slots(0, world=2, attempt=1)
    agree(slots)
    assert take(slots, 1)
    protect(slots, step=1)
    stranger = Node(a.directory.parent, "stranger")
    try:
        stranger.meet(a, b, buddy="b", key="guessed")
        with pytest.raises(Refused, match="does not know this job's secret"):
            stranger.prepare(2, {2: (1, 1)}, [0], world=2, memory=wanted(2, (1, 1), {0: ["b"]}))
    finally:
        stranger.end()


def test_too_little_memory_is_said_and_costs_snapshots_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from keepstep.session.slots import Slots

    with nodes(tmp_path, "a") as (a,):
        a.ask(do="peers", addresses={}, buddy="", secret="", bytes_max=1 << 20)
        found = Slots.open({"KEEPSTEP_CARRIER": str(a.directory)}, rank=0, world=1, attempt=1, **maxima())
        assert found is None
        assert "three slots of rank 0 need 9 MB" in caplog.text
        assert "three slots of rank 0 need 9 MB" in a.ask(do="held")["trouble"], "for the agent to tell"


def test_a_carrier_is_small_and_keeps_nothing_resident(pair: list[Node]) -> None:
    a, b = pair
    ranks = [a.slots(0, world=2, attempt=1), b.slots(1, world=2, attempt=1)]
    for step in range(1, 20):
        agree(*ranks)
        assert all(take(slots, step) for slots in ranks)
        protect(*ranks, step=step)
    for node in pair:
        status = Path(f"/proc/{node.pid}/status").read_text()
        anonymous = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
        shared = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssShmem"))
        assert anonymous < 30 << 10, f"{anonymous} kB"
        assert shared == 0, "slots are not mapped"


def test_a_carrier_ends_with_its_folder(tmp_path: Path) -> None:
    node = Node(tmp_path, "a")
    pid = node.pid
    node.end()
    until(lambda: (carrier := processes.read(pid)) is None or not carrier.alive, "the carrier to end")
