from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstep.agent.spool import Spool
from keepstep.core.clock import ManualClock

Opener = Callable[..., Spool]


def spool_in(
    folder: Path, clock: ManualClock | None = None, *, boot: str = "boot-1", bytes_max: int = 16 << 20
) -> Spool:
    folder.mkdir(exist_ok=True)
    return Spool(folder, clock=clock or ManualClock(), boot=boot, bytes_max=bytes_max)


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens spools as agents do that were killed and came back; all are closed in the end."""
    spools: list[Spool] = []

    def one(*arguments: Any, **options: Any) -> Spool:
        spools.append(spool_in(*arguments, **options))
        return spools[-1]

    yield one
    for spool in spools:
        spool.close()


def numbers(spool: Spool) -> list[int]:
    return [event.number for event in spool.batch(events=10_000, bytes_max=1 << 30)]


def test_events_stay_until_they_are_acknowledged(tmp_path: Path, opened: Opener) -> None:
    clock = ManualClock(now=100.0)
    spool = opened(tmp_path / "s", clock)
    assert (spool.first, spool.last, spool.batch()) == (1, 0, ())
    spool.append("rank_exited", job="j", attempt=2, data={"text": "rank 3 exited with 1"})
    clock.advance(5.0)
    spool.append("points", data={"points": [[1, 0.0]]})
    first, second = spool.batch()
    assert (first.number, first.kind, first.job, first.attempt, first.age_s) == (
        1,
        "rank_exited",
        "j",
        2,
        5.0,
    )
    assert (second.number, second.age_s, second.data) == (2, 0.0, {"points": [[1, 0.0]]})
    spool.acknowledge(1)
    assert numbers(spool) == [2]
    spool.acknowledge(1)  # late, or twice
    assert numbers(spool) == [2]
    spool.acknowledge(2)
    assert numbers(spool) == [] and spool.first == 3


def test_a_new_agent_goes_on_where_the_old_one_was_killed(tmp_path: Path, opened: Opener) -> None:
    spool = opened(tmp_path / "s")
    for _ in range(3):
        spool.append("x")
    spool.acknowledge(2)
    again = opened(tmp_path / "s", ManualClock(now=50.0))
    assert numbers(again) == [3]
    assert again.append("y") == 4
    spool.acknowledge(3)
    again.acknowledge(4)
    assert opened(tmp_path / "s").append("z") == 5  # the number survives an empty spool


def test_another_boot_makes_ages_meaningless_and_skips_numbers(tmp_path: Path, opened: Opener) -> None:
    spool = opened(tmp_path / "s", ManualClock(now=1000.0))
    spool.append("before")
    again = opened(tmp_path / "s", ManualClock(now=3.0), boot="boot-2")
    number = again.append("after")
    assert number > 50_000  # what the page cache lost may have had the numbers between
    old, gap, new = again.batch()
    assert (old.kind, old.same_boot, old.age_s) == ("before", False, 0.0)
    assert (gap.kind, gap.number, gap.data["first"], gap.data["last"]) == ("gap", number - 1, 2, number - 1)
    assert (new.kind, new.same_boot) == ("after", True)


def test_a_full_spool_gives_up_the_oldest_and_says_so(tmp_path: Path, opened: Opener) -> None:
    spool = opened(tmp_path / "s", bytes_max=64 << 10)
    for _ in range(400):
        spool.append("x", data={"text": "y" * 1000})
    size = sum(path.stat().st_size for path in (tmp_path / "s").iterdir())
    assert size <= 72 << 10
    events = spool.batch(events=1000, bytes_max=1 << 30)
    assert events[0].kind == "gap" and events[0].data["first"] == 1
    assert [event.number for event in events] == list(range(events[0].number, 401))
    assert events[0].data["last"] == events[0].number == events[1].number - 1
    spool.acknowledge(events[0].number)  # the gap is acknowledged like any other
    assert numbers(spool)[0] == events[1].number


def test_the_controller_may_remember_more_than_the_disk(tmp_path: Path, opened: Opener) -> None:
    spool = opened(tmp_path / "s")
    spool.append("x")
    spool.acknowledge(700)  # of an earlier life of this folder
    assert spool.batch() == ()
    assert spool.append("y") == 701
    assert numbers(opened(tmp_path / "s")) == [701]


def test_batches_are_bounded_in_number_and_size(tmp_path: Path, opened: Opener) -> None:
    spool = opened(tmp_path / "s")
    for _ in range(10):
        spool.append("x", data={"text": "y" * 1000})
    assert len(spool.batch(events=4)) == 4
    assert len(spool.batch(bytes_max=3500)) == 3
    assert len(spool.batch(bytes_max=1)) == 1  # one always goes


@pytest.mark.parametrize("cut", [1, 5, 9, 30])
def test_half_a_frame_is_cut_off(tmp_path: Path, opened: Opener, cut: int) -> None:
    spool = opened(tmp_path / "s")
    spool.append("whole")
    spool.append("torn", data={"text": "a" * 50})
    spool.close()
    (segment,) = (tmp_path / "s").glob("*.events")
    segment.write_bytes(segment.read_bytes()[:-cut])
    again = opened(tmp_path / "s")
    assert numbers(again) == [1]
    assert again.append("next") == 2
    assert [event.kind for event in opened(tmp_path / "s").batch()] == ["whole", "next"]


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.sampled_from(["append", "send", "lose", "restart", "reboot"]), max_size=60))
def test_whatever_happens_the_controller_sees_every_number_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    """`send`: a batch arrives and is acknowledged. `lose`: it arrives, and the acknowledgement does not."""
    folder, boot = tmp_path_factory.mktemp("spool"), 1
    spool = spool_in(folder, boot="boot-1", bytes_max=1 << 20)
    appended: list[int] = []
    stored: dict[int, str] = {}
    for step in steps:
        match step:
            case "append":
                appended.append(spool.append("x"))
            case "send" | "lose":
                batch = spool.batch(events=3)
                assert [e.number for e in batch] == sorted({e.number for e in batch})
                for event in batch:
                    assert stored.setdefault(event.number, event.kind) == event.kind
                if step == "send" and batch:
                    spool.acknowledge(batch[-1].number)
            case _:
                boot += step == "reboot"
                spool.close()
                spool = spool_in(folder, boot=f"boot-{boot}", bytes_max=1 << 20)
    while batch := spool.batch():
        stored |= {event.number: event.kind for event in batch}
        spool.acknowledge(batch[-1].number)
    assert appended == sorted(set(appended))
    assert [number for number, kind in sorted(stored.items()) if kind == "x"] == appended
    spool.close()


def test_a_power_cut_may_empty_the_acknowledgement(tmp_path: Path, opened: Opener) -> None:
    spool = opened(tmp_path / "s")
    for _ in range(3):
        spool.append("x")
    spool.acknowledge(2)
    (tmp_path / "s" / "acknowledged").write_bytes(b"")
    again = opened(tmp_path / "s", boot="boot-2")
    assert numbers(again)[:3] == [1, 2, 3]  # sent again: the controller knows what it has
    assert again.append("y") > 3
