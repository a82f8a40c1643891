"""Versions N-1, N and N+1 understand each other.

`tests/golden/wire/*.msgpack` are messages as this version writes them. A later version must still read them,
and an incompatible change of the structs fails here. `pytest --golden-rewrite` writes them anew; a person
decides whether what changed may change.
"""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from keepstep.wire import messages as wire

GOLDEN = Path(__file__).parents[1] / "golden" / "wire"

RANK = wire.RankStatus(
    rank=5, local_rank=1, state="exited", pid=4711, exit_code=None, signal=9, exited_age_s=0.25, exit_order=1,
    step=120, step_age_s=1.5, phase="backward", phase_age_s=0.75, micro_batch=2, counter=9001,
    checkpoint_step=100, stall_s=0.125, error="RuntimeError: no", last_lines=("a", "b"),
)  # fmt: skip
ATTEMPT = wire.AttemptStatus(
    job="llama-abcd", attempt=2, phase="ending", reason="a rank crashed", master=("10.0.0.1", 29500),
    warm=True, alive=3, unfenced_s=0.5, ranks=(RANK,),
)  # fmt: skip
STATE = wire.State(
    sequence=42, leaving=True, attempts=(ATTEMPT,),
    node=wire.NodeStatus(
        load=1.5, memory_total_bytes=1 << 34, memory_available_bytes=1 << 33, agent_memory_bytes=1 << 25
    ),
    standbys=(wire.StandbyStatus(job="llama-abcd", state="ready", memory_bytes=1 << 28),),
)  # fmt: skip
LAUNCH = wire.Launch(
    job="llama-abcd", attempt=2, name="llama", project="p", world_size=8, nodes=("a", "b"), node_rank=1,
    ranks=(4, 5, 6, 7), go=True, master=("10.0.0.1", 29500), run={"kind": "llama", "steps": 10},
    layout={"dp": 2, "pp": 2, "cp": 1, "tp": 2}, replicas=2, checkpoint={"dir": "/ckpt"}, restore=(1, 60),
    lineage=((1, 0, 0), (2, 1, 60)), self_fence_s=None, orphan_lease_s=1800.0, attached=True,
)  # fmt: skip
MESSAGES: dict[str, wire.Message] = {
    "register": wire.Register(
        protocol=1, version="0.1.0", node="a", role="run+watch", pool="local", instance="k3f9x2b7",
        boot_id="0b00", hostname="host-a", pid=17, address="10.0.0.1", interface="eth0", slots=8,
        gpus=("GPU-1",), labels={"rack": "r1"}, capabilities=("logs",), first_event=7, state=STATE,
    ),
    "state": STATE,
    "events": wire.Events(
        events=(
            wire.Event(
                number=7, kind="gap", age_s=2.0, same_boot=False, job="j", attempt=1, data={"first": 3}
            ),
        )
    ),
    "answer": wire.Answer(id=3, data={"lines": [[0, "text"]]}, error="none"),
    "welcome": wire.Welcome(
        protocol=1, version="0.1.0", term=4, state_every_s=2.0, lease_s=20.0, acknowledged_event=6
    ),
    "refusal": wire.Refusal(what="no", why="because", next="ask", retry_after_s=5.0),
    "ack": wire.Acknowledge(sequence=42, event=7),
    "desired": wire.Desired(
        term=4, instance="k3f9x2b7", launches=(LAUNCH,), forget=(("llama-abcd", 1),),
        stops=(wire.Stop(job="llama-abcd", attempt=1, reason="r", grace_s=3.0),),
        warm=(wire.Warm(job="llama-abcd", run={"kind": "llama"}),),
    ),
    "query": wire.Query(id=3, kind="logs", term=4, params={"job": "llama-abcd", "tail": 10}),
}  # fmt: skip
FROM_AGENT = {"register", "state", "events", "answer"}


def decode(tag: str, data: bytes) -> wire.FromAgent | wire.FromController | None:
    return wire.decode_from_agent(data) if tag in FROM_AGENT else wire.decode_from_controller(data)


def test_every_message_is_recorded() -> None:
    kinds = wire.FromAgent.__args__ + wire.FromController.__args__
    assert {kind.__struct_config__.tag for kind in kinds} == MESSAGES.keys()


@pytest.mark.parametrize("tag", MESSAGES)
def test_recorded_bytes_are_still_read(tag: str, golden_rewrite: bool) -> None:
    path = GOLDEN / f"{tag}.msgpack"
    if golden_rewrite:
        path.write_bytes(wire.encode(MESSAGES[tag]))
    assert decode(tag, path.read_bytes()) == MESSAGES[tag]


@pytest.mark.parametrize("tag", MESSAGES)
def test_fields_of_a_newer_version_are_passed_over(tag: str) -> None:
    plain = msgspec.msgpack.decode((GOLDEN / f"{tag}.msgpack").read_bytes())
    newer = msgspec.msgpack.encode(_with_more(plain))
    assert decode(tag, newer) == MESSAGES[tag]


@pytest.mark.parametrize("tag", MESSAGES)
def test_what_an_older_version_did_not_send_has_a_default(tag: str) -> None:
    """Only what the first version required is required."""
    required = {
        "register": {"protocol", "version", "node", "instance", "boot_id"}, "state": {"sequence"},
        "events": {"events"}, "answer": {"id"}, "welcome": {"protocol", "version", "term"},
        "refusal": {"what"}, "ack": {"sequence"}, "desired": {"term", "instance"},
        "query": {"id", "kind", "term"},
    }  # fmt: skip
    plain = msgspec.msgpack.decode((GOLDEN / f"{tag}.msgpack").read_bytes())
    older = {name: value for name, value in plain.items() if name in required[tag] | {"t"}}
    read = decode(tag, msgspec.msgpack.encode(older))
    assert type(read) is type(MESSAGES[tag])


def test_a_kind_of_a_newer_version_is_skipped_and_nonsense_is_not() -> None:
    newer = msgspec.msgpack.encode({"t": "teleport", "rank": 3})
    assert wire.decode_from_agent(newer) is None
    assert wire.decode_from_controller(newer) is None
    wrong = msgspec.msgpack.encode({"t": "state", "sequence": "not a number"})
    for nonsense in (b"", b"\xc1", b"\x93\x01\x02\x03", wrong):
        with pytest.raises(msgspec.MsgspecError):
            wire.decode_from_agent(nonsense)


def _with_more(value: Any) -> Any:
    """Every map of ours gets a field that nobody knows; what users put in stays as it is."""
    if isinstance(value, dict):
        own = {"data", "params", "run", "layout", "checkpoint", "labels"}
        more = {name: item if name in own else _with_more(item) for name, item in value.items()}
        return {"from_the_future": [1, {"x": None}], **more}
    if isinstance(value, list):
        return [_with_more(item) for item in value]
    return value
