"""What carriers hold becomes a checkpoint: written without PyTorch, loaded in every layout, or not there."""

import asyncio
import fcntl
import mmap
import os
import platform
import resource
import select
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from carriers import Node, agree, content, nodes, take, until
from integration.test_checkpoint import SHAPE, assert_is_step, at, expected, state_of
from keepstep.agent import saving
from keepstep.agent.carriers import Carriers
from keepstep.agent.folder import Folder
from keepstep.core.beacon import PAGE
from keepstep.core.checkpoints import MANIFEST, folder_name, inventory, raise_fence
from keepstep.core.clock import SystemClock
from keepstep.core.errors import KeepstepError, Refused, Unreachable
from keepstep.core.ids import Attempt
from keepstep.core.layout import Layout, local_ranks
from keepstep.core.snapshots import Stamp
from keepstep.llama.checkpoint import CorruptCheckpoint, load
from keepstep.llama.job import TrainJob
from keepstep.llama.memory import Snapshots
from keepstep.session import Session
from keepstep.session.carrier import Carrier
from keepstep.session.slots import Slots

LAYOUT, STEP = Layout(dp=2, pp=2, tp=2), 20
JOB: dict[str, Any] = {
    "job": "job", "layout": asdict(LAYOUT), "model": asdict(SHAPE), "steps": 30,
    "batch": {"global_tokens": 256, "seq": 32}, "optimizer": {"lr": 1e-3, "warmup_steps": 1},
}  # fmt: skip
FOLDER = folder_name(at(STEP))
POSITION = {"seed": 0, "samples": 160}


def values(step: int) -> dict[str, Any]:
    return {"tokens": step * 256, "data": POSITION}


@pytest.fixture
def gang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Node], list[Snapshots]]]:
    """Two nodes that hold step 20 of all eight ranks, in the trainer's own snapshots."""
    with nodes(tmp_path, "a", "b") as found:
        taken = []
        for k, node in enumerate(found):
            monkeypatch.setenv("KEEPSTEP_CARRIER", str(node.directory))
            for rank in local_ranks(LAYOUT.world_size, 2, k):
                state = state_of(LAYOUT, rank)
                state.state.copy_(expected(state.index, state.dp_rank, STEP))
                session = Session(mmap.mmap(-1, PAGE), rank=rank, world_size=8, attached=False)
                one = Snapshots(TrainJob.parse(JOB), state, session, values)
                one.resume(STEP)
                taken.append(one)
        yield found, taken
        for one in taken:
            one.close()


@pytest.fixture
def held(gang: tuple[list[Node], list[Snapshots]]) -> list[Node]:
    return gang[0]


def ask(node: Node, stage: str, folder: Path, **more: Any) -> dict[str, Any]:
    """As the controller asks the node's agent."""
    agent = Folder(node.directory.parents[1])
    carriers = Carriers(agent, SystemClock(), bytes_max=None, changed=lambda: None, tell=lambda *_: None)
    params = {
        "stage": stage, "job": "job", "dir": str(folder), "at": [1, STEP], "world": 8,
        "lineage": [[1, 0, 0]], "within_s": 60.0, **more,
    }  # fmt: skip
    return asyncio.run(saving.save(params, carriers))


def write(held: list[Node], folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for k, node in enumerate(held):
        answer = ask(node, "write", folder, ranks=list(local_ranks(8, 2, k)))
        files |= answer["files"]
    return {"files": files, "about": answer["about"], "layout": asdict(LAYOUT), "after": 1}


def complete(folder: Path) -> list[bool]:
    return [one.complete for one in inventory(folder)]


def test_what_two_nodes_hold_loads_in_every_layout(held: list[Node], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    written = write(held, folder)
    assert complete(folder) == [False], "not before it is sealed"
    assert ask(held[1], "seal", folder, **written) == {"complete": True}
    assert complete(folder) == [True]
    assert ask(held[0], "write", folder, ranks=[0]) == {"complete": True}, "nothing is written twice"
    assert ask(held[0], "discard", folder) == {}
    for layout in (
        LAYOUT,
        Layout(),
        Layout(dp=1, pp=4, tp=1),
        Layout(dp=4, pp=1, tp=2),
        Layout(dp=1, pp=2, tp=4),
        Layout(dp=2, cp=2, tp=2),
    ):
        for rank in range(layout.world_size):
            state = state_of(layout, rank)
            manifest = load(folder, at(STEP), state, model=SHAPE, group=None)
            assert_is_step(state, STEP)
    assert (manifest.tokens, manifest.data, manifest.torch) == (STEP * 256, POSITION, torch.__version__)


def test_a_file_that_was_changed_is_refused(held: list[Node], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    ask(held[0], "seal", folder, **write(held, folder))
    path = folder / FOLDER / "rank-00003.slot"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"rank-00003\.slot"):
        load(folder, at(STEP), state_of(LAYOUT, 0), model=SHAPE, group=None)


def test_a_full_storage_leaves_nothing_behind(held: list[Node], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    ask(held[1], "write", folder, ranks=[4, 5])
    limit = resource.prlimit(held[0].pid, resource.RLIMIT_FSIZE)
    resource.prlimit(held[0].pid, resource.RLIMIT_FSIZE, (8192, limit[1]))
    with pytest.raises(KeepstepError, match="File too large"):
        ask(held[0], "write", folder, ranks=[0, 1, 2, 3])
    resource.prlimit(held[0].pid, resource.RLIMIT_FSIZE, limit)
    ask(held[1], "discard", folder)
    assert list(folder.iterdir()) == []
    own = {(rank, 1, STEP, True) for rank in range(4)}
    assert own <= held[0].held(), "and costs nothing in memory"


def test_a_carrier_that_is_killed_in_the_middle_completes_nothing(held: list[Node], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / FOLDER).mkdir(parents=True)
    draft = folder / FOLDER / f".rank-00001.slot.{platform.node()}.{held[0].pid}"
    os.mkfifo(draft)  # a storage that takes what one reads from it
    failed: list[Exception] = []

    def writes() -> None:
        try:
            ask(held[0], "write", folder, ranks=[0, 1])
        except KeepstepError as error:
            failed.append(error)

    reader = os.open(draft, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    writer = threading.Thread(target=writes)
    writer.start()
    assert select.select([reader], [], [], 60)[0]  # it is in the middle of rank 1
    held[0].kill()
    writer.join(60)
    os.close(reader)
    assert isinstance(failed[0], Unreachable)
    assert complete(folder) == [False]
    with pytest.raises(Refused, match=r"rank-00001\.slot is not what was written"):
        ask(held[1], "seal", folder, files={"rank-00001.slot": [1, "0"]}, about={}, layout={}, after=1)
    ask(held[1], "discard", folder)
    assert list(folder.iterdir()) == []


def test_a_damaged_slot_is_not_stored(gang: tuple[list[Node], list[Snapshots]], tmp_path: Path) -> None:
    (a, _), taken = gang
    slots = taken[2].slots
    assert slots is not None
    slots.payload(0)[100] ^= 1
    with pytest.raises(Refused, match="step 20 of rank 2 is damaged in memory"):
        ask(a, "write", tmp_path / "checkpoints", ranks=[0, 1, 2, 3])
    assert (2, 1, STEP, True) not in a.held(), "nor offered again"


def test_a_folder_that_was_taken_over_is_left_alone(held: list[Node], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    written = write(held, folder)
    raise_fence(folder, Attempt(2))
    with pytest.raises(Refused, match="attempt 2 has taken over"):
        ask(held[0], "seal", folder, **written)
    assert not (folder / FOLDER / MANIFEST).exists()
    assert ask(held[0], "seal", folder, **{**written, "after": 2}) == {"complete": True}
    until(lambda: complete(folder) == [True], "the checkpoint")


def test_a_script_finds_its_stored_state_where_memory_would_have_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with nodes(tmp_path, "a", "b") as found:
        ranks = [found[k].slots(k, world=2, attempt=1) for k in range(2)]
        agree(*ranks)
        assert all(take(slots, STEP) for slots in ranks)
        files: dict[str, Any] = {}
        for k, node in enumerate(found):
            files |= ask(node, "write", folder, ranks=[k], world=2)["files"]
        more = {"files": files, "about": {}, "layout": {"dp": 2}, "after": 1, "keep": 1}
        (folder / folder_name(at(10))).mkdir()
        for step in (10, STEP):  # the older one goes when the newer one is there
            ask(found[0], "seal", folder, **{**more, "files": files if step == STEP else {}, "at": [1, step]})
        assert [one.at.step for one in inventory(folder)] == [STEP]
    with nodes(tmp_path / "later", "a", "b") as found:
        request = {"do": "prepare", "attempt": 2, "lineage": [[1, 0, 0], [2, 1, STEP]], "memory": None}
        request["saved"] = str(folder / FOLDER)
        found[1].ask(**request, world=2, ranks=[1])
        assert found[1].ask(do="begun")["begun"] == {"world": 2, "at": [1, STEP]}
        carrier = Carrier(found[1].directory)
        state = Slots.states(carrier, [1], 2, Stamp(1, STEP))[0]
        assert bytes(state.payload) == content(1, STEP)
        carrier.close()
        slots = Slots.open(
            {"KEEPSTEP_CARRIER": str(found[1].directory)}, rank=1, world=2, attempt=2,
            description_max=state.shape.description_max, payload_max=state.shape.payload_max,
        )  # fmt: skip
        assert slots is not None
        assert slots.resume(STEP), "the rank goes on in the slots that it was restored from"
        slots.close()
        found[0].ask(**request, world=4, ranks=[0, 1])
        assert found[0].ask(do="begun")["begun"] is None, "a script's state is cut by nobody"
        assert "was stored of 2 ranks" in found[0].ask(do="held")["trouble"]
        (folder / FOLDER / "rank-00000.slot").write_bytes(b"torn")
        with pytest.raises(Refused, match=r"rank-00000\.slot has 4 bytes"):
            found[0].ask(**request, world=2, ranks=[0])
