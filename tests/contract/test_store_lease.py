"""One controller at a time, with real processes that are stopped, continued and killed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepstep.core.clock import Clock, ManualClock, SystemClock
from keepstep.core.errors import Fenced, Refused
from keepstep.store import Store, this_process
from keepstep.store.rows import NewEvent

HOLDER = Path(__file__).with_name("store_holder.py")

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start(store_url: str) -> Iterator[Start]:
    """Starts another controller; all that were started are dead afterwards."""
    children: list[subprocess.Popen[str]] = []

    def run(mode: str) -> "subprocess.Popen[str]":
        child = subprocess.Popen(
            [sys.executable, str(HOLDER), mode, store_url], stdout=subprocess.PIPE, text=True
        )
        children.append(child)
        assert _line(child) == "holds"
        return child

    yield run
    for child in children:
        child.kill()
        child.wait(10)
        assert child.stdout is not None
        child.stdout.close()


@pytest.fixture
def opened(store_url: str) -> Iterator[Callable[..., Store]]:
    stores: list[Store] = []

    def make(clock: Clock | None = None, busy_s: float = 5.0) -> Store:
        stores.append(Store.open(store_url, clock=clock or SystemClock(), busy_s=busy_s))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def _line(child: "subprocess.Popen[str]", deadline_s: float = 20.0) -> str:
    """The next line that a child prints; a child that prints nothing in time is ended."""
    assert child.stdout is not None
    timer = threading.Timer(deadline_s, child.kill)
    timer.start()
    try:
        return child.stdout.readline().strip()
    finally:
        timer.cancel()
        timer.join()


def test_a_living_controller_keeps_the_store(start: Start, opened: Callable[..., Store]) -> None:
    child = start("beat")
    with pytest.raises(Refused) as refused:
        opened().acquire(this_process())
    assert str(child.pid) in str(refused.value)
    assert "http://holder.test" in str(refused.value)
    assert child.poll() is None


def test_a_stopped_controller_is_replaced_and_refused_when_it_goes_on(
    start: Start, opened: Callable[..., Store]
) -> None:
    child = start("stop")  # between two writes; inside one: see below
    _wait_for_state(child.pid, "T")
    store = opened()
    assert store.acquire(this_process(), patience_s=1.0) == 2
    with store.transaction() as write:
        write.add_event(NewEvent(kind="test", text="of the new term"))
    os.kill(child.pid, signal.SIGCONT)
    assert _line(child) == "Fenced"
    store.beat()  # the new holder's is untouched


def test_a_controller_that_is_gone_is_replaced_at_once(start: Start, opened: Callable[..., Store]) -> None:
    child = start("beat")
    store = opened()
    child.kill()  # not reaped: a zombie is gone, too

    def never(_: float) -> None:
        raise AssertionError("nothing was to be waited for")

    _wait_for_state(child.pid, "Z")
    assert store.acquire(this_process(), patience_s=60.0, sleep=never) == 2


def test_a_released_store_is_free_at_once(opened: Callable[..., Store]) -> None:
    first, second = opened(), opened()
    assert first.acquire(this_process(), patience_s=60.0) == 1
    first.release()
    assert second.acquire(this_process(), patience_s=60.0) == 2
    with pytest.raises(Fenced):
        first.beat()


def test_of_two_that_see_a_silent_holder_only_one_takes_over(opened: Callable[..., Store]) -> None:
    opened().acquire(this_process())
    results: list[object] = []
    barrier = threading.Barrier(3)

    def take(store: Store) -> None:
        barrier.wait(10)
        try:
            results.append(store.acquire(this_process(), patience_s=0.5))
        except Refused:
            results.append("refused")

    threads = [threading.Thread(target=take, args=(opened(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(results, key=str) == [2, "refused", "refused"]


def test_the_watchers_own_pause_is_no_silence(opened: Callable[..., Store]) -> None:
    """A laptop lid that was closed for an hour while we watched says nothing about the holder."""
    opened().acquire(this_process())
    clock = ManualClock()
    looks = 0

    def asleep(_: float) -> None:
        nonlocal looks
        looks += 1
        clock.advance(3600.0)

    opened(clock).acquire(this_process(), patience_s=10.0, sleep=asleep)
    assert looks >= 25


def test_no_write_without_the_lease(opened: Callable[..., Store]) -> None:
    store = opened()
    with pytest.raises(Fenced), store.transaction():
        pytest.fail("a transaction began without a term")
    with pytest.raises(Fenced):
        store.tokens.issue(name="a", role="admin")
    with pytest.raises(Fenced):
        store.beat()


def test_a_transaction_that_began_before_a_takeover_keeps_it_out(opened: Callable[..., Store]) -> None:
    """The term is locked inside a write, so nobody takes over between the check and the commit."""
    first, second = opened(), opened(busy_s=0.3)
    first.acquire(this_process())
    with first.transaction() as write:
        with pytest.raises(Refused, match="does not move"):
            second.acquire(this_process(), patience_s=0.1)
        write.add_event(NewEvent(kind="test", text="first"))
    assert [event.text for event in first.events().items] == ["first"]


def test_a_controller_stopped_inside_a_write_is_named(start: Start, opened: Callable[..., Store]) -> None:
    child = start("inside")
    assert _line(child) == "inside"
    os.kill(child.pid, signal.SIGSTOP)
    store = opened(busy_s=0.3)
    with pytest.raises(Refused) as refused:
        store.acquire(this_process(), patience_s=0.5)
    assert f"kill -KILL {child.pid}" in str(refused.value)
    child.kill()
    child.wait(10)
    assert store.acquire(this_process()) == 2
    assert store.last_event() == 0  # what it had not committed is not there


@pytest.mark.parametrize("seed", range(2))
def test_no_acknowledged_row_is_lost_by_a_kill(start: Start, opened: Callable[..., Store], seed: int) -> None:
    child = start("stream")
    acknowledged = 0
    for _ in range(random.Random(seed).randrange(20, 200)):
        acknowledged = int(_line(child))
    child.kill()
    assert child.stdout is not None
    for line in child.stdout:  # what was acknowledged while the signal was under way
        if line.endswith("\n"):
            acknowledged = int(line)
    child.wait(10)
    store = opened()
    texts = [event.text for event in store.events(limit=1000).items]
    assert len(texts) >= acknowledged
    assert texts == [str(k + 1) for k in range(len(texts))]
    assert store.acquire(this_process()) == 2


def _wait_for_state(pid: int, state: str) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != state:
        assert time.monotonic() < deadline
        time.sleep(0.01)
