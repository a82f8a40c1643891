"""A state in memory is stored by whoever can: the controller, over agents that answer as they are told."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from golden.decide_script import spec_of
from keepstep.control import stored
from keepstep.control.book import Book, Entry
from keepstep.control.fleet import Fleet
from keepstep.control.observed import ObservedTime
from keepstep.core.clock import ManualClock
from keepstep.core.ids import Attempt, JobId, Node, Step
from keepstep.core.layout import Layout
from keepstep.decide.plan import Memory, Save
from keepstep.decide.view import Saving, Stored
from keepstep.spec import to_dict
from keepstep.store import Store, this_process
from keepstep.store.rows import NewEvent
from keepstep.wire import messages as wire

AT = Stored(attempt=Attempt(1), step=Step(60))
Told = list[tuple[str, str, Any]]


class Agent:
    """One node's connection: refuses the stages that it is told to, and answers the others."""

    def __init__(self, fleet: Fleet, name: str, refuses: set[str], told: Told) -> None:
        self._fleet, self._name, self._refuses, self._told = fleet, name, refuses, told
        register = wire.Register(protocol=1, version="0", node=name, instance=name, boot_id="b")
        self._member = fleet.register(register, self)

    def send(self, message: wire.Message) -> None:
        assert isinstance(message, wire.Query)
        stage = str(message.params["stage"])
        ranks = message.params.get("ranks")
        self._told.append((self._name, stage, ranks if stage == "write" else message.params.get("files")))
        answer = wire.Answer(id=message.id, error=f"{self._name} cannot {stage}")
        if stage not in self._refuses:
            files = {f"rank-{rank}": [1, "sum"] for rank in ranks or ()}
            answer = wire.Answer(id=message.id, data={"files": files, "about": {"job": "j"}})
        asyncio.get_running_loop().call_soon(self._fleet.answer, self._member, answer)

    def close(self, why: str) -> None:
        raise AssertionError(why)


@pytest.fixture
def entry(tmp_path: Path) -> Iterator[Entry]:
    """A job whose first attempt has ended on a and b."""
    store = Store.open(f"sqlite:///{tmp_path / 'store.db'}", clock=ManualClock(), chance=random.Random(7))
    store.acquire(this_process())
    with store.transaction() as write:
        job = write.add_job(name="j", spec=to_dict(spec_of("j", {})), pool="local", state="recovering")
        layout = {"dp": 2, "pp": 2, "cp": 1, "tp": 1}
        write.add_attempt(job=job.id, number=1, nodes=[Node("a"), Node("b")], layout=layout, state="ending")
    book = Book(store, ObservedTime(1.0))
    book.take(book.read(job.id))
    yield book.entries[job.id]
    store.close()


def save(entry: Entry, **refuses: set[str]) -> tuple[Told, list[NewEvent]]:
    """Ranks 0 and 1 are a's, with copies at b; 2 and 3 are b's own."""
    told: Told = []
    events: list[NewEvent] = []

    async def tell(event: NewEvent) -> None:
        events.append(event)

    async def work() -> None:
        fleet = Fleet(ObservedTime(1.0))
        for name in ("a", "b"):
            Agent(fleet, name, refuses.get(name, set()), told)
        own, others = (Node("a"), Node("b")), (Node("b"),)
        memory = Memory(layout=Layout(dp=2, pp=2), holders=(own, own, others, others))
        order = Save(job=JobId(entry.job.id), reason="it is needed", at=AT, memory=memory, within_s=60.0)
        entry.saving = 0.0, Saving(at=AT)
        await stored.save(fleet, entry, order, term=1, tell=tell)

    asyncio.run(work())
    return told, events


def outcome(entry: Entry) -> Saving:
    assert entry.saving is not None
    return entry.saving[1]


def test_each_holder_writes_its_own_and_one_completes_it(entry: Entry) -> None:
    told, events = save(entry)
    files = {f"rank-{rank}": [1, "sum"] for rank in range(4)}
    assert told == [("a", "write", [0, 1]), ("b", "write", [2, 3]), ("a", "seal", files)]
    assert [event.kind for event in events] == ["saving", "saved"]
    assert events[1].text == "step 60 is stored from memory, written by a, b"
    assert outcome(entry).done
    assert entry.progress.checkpoint_step == 60


def test_who_has_a_copy_writes_what_its_owner_cannot(entry: Entry) -> None:
    told, events = save(entry, a={"write"})
    writes = [one for one in told if one[1] == "write"]
    assert writes == [("a", "write", [0, 1]), ("b", "write", [2, 3]), ("b", "write", [0, 1])]
    assert told[-1][:2] == ("b", "seal")
    assert events[-1].text == "step 60 is stored from memory, written by b"


def test_another_one_completes_it_when_the_first_cannot(entry: Entry) -> None:
    told, events = save(entry, a={"seal"})
    assert [one[:2] for one in told[-2:]] == [("a", "seal"), ("b", "seal")]
    assert events[-1].kind == "saved"


def test_what_nobody_can_write_is_removed_and_said_and_the_job_goes_on(entry: Entry) -> None:
    told, events = save(entry, b={"write"})
    assert told[-1][:2] == ("a", "discard")
    assert events[-1].kind == "save_failed"
    assert "b cannot write" in events[-1].text
    assert outcome(entry).error
    assert not outcome(entry).done
    assert entry.progress.checkpoint_step == -1
