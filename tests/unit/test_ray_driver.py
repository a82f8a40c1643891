"""What Ray's own tables say, in keepstep's words. Needs Ray, but no cluster."""

import importlib.util
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.mark.parametrize(
    ("reason", "name", "orderly"),
    [
        (0, "UNSPECIFIED", False),
        (1, "EXPECTED_TERMINATION", True),
        (2, "UNEXPECTED_TERMINATION", False),
        (3, "AUTOSCALER_DRAIN_PREEMPTED", False),  # also said of one that only fell silent after its deadline
        (4, "AUTOSCALER_DRAIN_IDLE", True),
    ],
)
def test_only_what_a_raylet_announced_itself_is_an_orderly_death(
    reason: int, name: str, orderly: bool
) -> None:
    from keepstep.pools.ray.driver import _node

    row: dict[str, Any] = {
        "NodeID": "1",
        "NodeName": "a",
        "NodeManagerAddress": "10.0.0.1",
        "Resources": {},
        "Labels": None,
    }
    dead = _node({**row, "Alive": False, "DeathReason": reason, "DeathReasonMessage": "silence"}, {}, {})
    assert (dead.death, dead.orderly) == (f"{name}: silence", orderly)
    alive = _node({**row, "Alive": True, "DeathReason": 0, "DeathReasonMessage": ""}, {}, {})
    assert (alive.death, alive.orderly) == ("", False)
