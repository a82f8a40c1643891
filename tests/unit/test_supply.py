"""What pools are told of nodes that are taken out, and of whose the things are that were made there."""

from pathlib import Path

import pytest

from keepstep.api.process import _identity
from keepstep.control.fleet import Member
from keepstep.control.supply import _for_good
from keepstep.core.clock import SystemClock
from keepstep.core.ids import Node
from keepstep.core.states import LifeState, NodeState
from keepstep.decide.life import KEEPSTEP
from keepstep.store import Store, this_process


@pytest.mark.parametrize(
    ("state", "owner", "good"),
    [
        (LifeState.CORDONED, "ann", False),
        (LifeState.DRAINING, "ann", True),
        (LifeState.QUARANTINED, "ann", True),
        (LifeState.VALIDATING, "ann", False),
        (LifeState.DRAINING, "pool ray", False),  # Ray does so already
        (LifeState.DRAINING, KEEPSTEP, False),  # it is repaired and comes back ...
        (LifeState.REPLACE, KEEPSTEP, True),  # ... or not
    ],
)
def test_what_a_person_drains_and_what_no_repair_helps_leaves_for_good(
    state: LifeState, owner: str, good: bool
) -> None:
    member = Member(name=Node("a"), pool="ray", slots=8, state=NodeState.READY, heard_at=0.0)
    member.life, member.life_by = state, owner
    assert _for_good(member) is good


def test_every_holder_of_a_store_knows_what_an_earlier_one_made(tmp_path: Path) -> None:
    def told(url: str) -> str:
        store = Store.open(url, clock=SystemClock())
        try:
            store.acquire(this_process())
            return _identity(store)
        finally:
            store.release()
            store.close()

    first = told(f"sqlite:///{tmp_path / 'one.db'}")
    assert first == told(f"sqlite:///{tmp_path / 'one.db'}") != told(f"sqlite:///{tmp_path / 'other.db'}")
