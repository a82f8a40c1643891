"""Saving in one layout, loading in another; and everything that can go wrong in between."""

import json
import logging
import mmap
import os
import pickle
import random
import resource
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import forked
from keepstep.core import durable
from keepstep.core.beacon import PAGE, BeaconReader
from keepstep.core.checkpoints import (
    MANIFEST,
    Branch,
    Found,
    Point,
    folder_name,
    inventory,
    raise_fence,
    restorable,
)
from keepstep.core.errors import InputError
from keepstep.core.ids import Attempt, JobId, Step
from keepstep.core.layout import Layout
from keepstep.llama.checkpoint import CorruptCheckpoint, Identity, Saver, dcp, load, verify
from keepstep.llama.checkpoint.restore import fill
from keepstep.llama.checkpoint.storage import KINDS
from keepstep.llama.flat import FlatIndex, FlatState
from keepstep.llama.shape import ModelShape
from keepstep.session import Session

SHAPE = ModelShape(layers=4, dim=24, ffn_dim=40, heads=4, kv_heads=4, vocabulary=36, max_seq=64)
POSITION = {"seed": 0, "step": 1, "samples": 4}


def at(step: int, attempt: int = 1) -> Point:
    return Point(step=Step(step), attempt=Attempt(attempt))


def whole(kind: str, name: str, size: tuple[int, ...], step: int) -> Tensor:
    """A global tensor whose values depend on everything that could be confused."""
    generator = torch.Generator().manual_seed(hash((KINDS.index(kind), *name.encode(), step)) % 2**31)
    return torch.randn(size, generator=generator)


def expected(index: FlatIndex, dp_rank: int, step: int) -> Tensor:
    """What a rank must hold, cut out of the global tensors one parameter at a time; padding is zero."""
    parts = []
    for kind in KINDS:
        flat = torch.zeros(index.length)
        for p in index.parameters:
            tensor = whole(kind, p.name, p.global_shape, step)
            if p.tp_dim is not None:
                tensor = tensor.narrow(p.tp_dim, p.tp_offset, p.shape[p.tp_dim])
            flat[p.offset : p.offset + p.numel] = tensor.flatten()
        (owned,) = index.owned(dp_rank)
        parts.append(flat[owned.start : owned.stop])
    return torch.cat(parts)


def state_of(layout: Layout, rank: int) -> FlatState:
    coordinates = layout.coordinates(rank)
    index = FlatIndex.of(SHAPE, layout, coordinates)
    return FlatState(index, coordinates.dp, device=torch.device("cpu"), dtype=torch.float32)


def group_of(layout: Layout) -> dist.ProcessGroup | None:
    if layout.world_size == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=30))
    assert isinstance(group, dist.ProcessGroup)
    return group


def silent() -> Session:
    return Session(mmap.mmap(-1, PAGE), rank=0, world_size=1, attached=False)


def saver_of(
    folder: Path,
    layout: Layout,
    rank: int,
    *,
    attempt: int = 1,
    keep: int = 3,
    branches: tuple[Branch, ...] = (),
    session: Session | None = None,
) -> tuple[Saver, FlatState]:
    state = state_of(layout, rank)
    identity = Identity(job="j", attempt=attempt, layout=layout, model=SHAPE, branches=branches)
    saver = Saver(
        folder, state, identity, group=group_of(layout), session=session or silent(), keep=keep, wait_s=30
    )
    return saver, state


def save(saver: Saver, state: FlatState, step: int) -> int:
    """Save the state that belongs to a step and wait for it; the newest committed step."""
    state.state.copy_(expected(state.index, state.dp_rank, step))
    saver.save(step, tokens=step * 100, data=POSITION)
    return saver.close()


def save_here(folder: Path, *steps: int, attempt: int = 1) -> None:
    """Checkpoints of a single process."""
    saver, state = saver_of(folder, Layout(), 0, attempt=attempt)
    for step in steps:
        assert save(saver, state, step) == step


def load_here(folder: Path, step: int, attempt: int = 1) -> FlatState:
    state = state_of(Layout(), 0)
    load(folder, at(step, attempt), state, model=SHAPE, group=None)
    return state


def assert_is_step(state: FlatState, step: int) -> None:
    assert state.step == step
    assert torch.equal(state.state, expected(state.index, state.dp_rank, step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 and 20 of a 2 x 2 x 2 gang."""
    folder, layout = tmp_path_factory.mktemp("checkpoints"), Layout(dp=2, pp=2, tp=2)

    def work(rank: int) -> list[int]:
        saver, state = saver_of(folder, layout, rank)
        return [save(saver, state, step) for step in (10, 20)]

    assert forked.run(8, work) == [[10, 20]] * 8
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, pp=2, tp=2),
        Layout(dp=2, pp=1, tp=2),
        Layout(dp=1, pp=4, tp=2),
        Layout(dp=4, pp=1, tp=2),
        Layout(dp=3, pp=1, tp=1),
        Layout(dp=1, pp=2, tp=4),
        Layout(),
    ],
    ids=str,
)
def test_loads_bitwise_in_every_layout(saved: Path, layout: Layout) -> None:
    def work(rank: int) -> None:
        state = state_of(layout, rank)
        manifest = load(saved, at(20), state, model=SHAPE, group=group_of(layout))
        assert_is_step(state, 20)
        assert (manifest.tokens, manifest.data) == (2000, POSITION)

    if layout.world_size == 1:
        work(0)
    else:
        forked.run(layout.world_size, work)


def test_owned_ranges_that_cut_through_rows_come_back(tmp_path: Path) -> None:
    """Six replicas of a small model: most owned ranges begin and end inside a row."""
    layout = Layout(dp=6)

    def work(rank: int) -> int:
        saver, state = saver_of(tmp_path, layout, rank)
        return save(saver, state, 1)

    assert forked.run(6, work) == [1] * 6
    assert_is_step(load_here(tmp_path, 1), 1)


def test_torch_reads_the_folder_without_keepstep(saved: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load  # drags half of torch in

    name, size = "layers.1.attention.wo.weight", (SHAPE.dim, SHAPE.dim)
    wanted = {f"{kind}.{name}": torch.zeros(size) for kind in KINDS}
    with pytest.warns(UserWarning, match="single process"):
        load(wanted, checkpoint_id=saved / folder_name(at(20)))
    for kind in KINDS:
        assert torch.equal(wanted[f"{kind}.{name}"], whole(kind, name, size, 20))


def test_what_torchs_own_writer_wrote_is_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save as save_by_torch

    save_here(tmp_path, 5)
    folder = tmp_path / folder_name(at(5))
    for path in folder.iterdir():
        if path.name != MANIFEST:
            path.unlink()
    names = {p.name: p.global_shape for p in state_of(Layout(), 0).index.parameters}
    tensors = {f"{kind}.{name}": whole(kind, name, size, 5) for kind in KINDS for name, size in names.items()}
    with pytest.warns(UserWarning, match="single process"):
        save_by_torch(tensors, checkpoint_id=folder)
    state = state_of(Layout(dp=2), 1)
    fill(folder, state)
    assert torch.equal(state.state, expected(state.index, 1, 5))


def test_metadata_that_asks_for_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / dcp.METADATA).write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match=r"it asks for builtins\.print"):
        dcp.read(tmp_path)


def test_manifest_says_what_was_saved(saved: Path) -> None:
    folder = saved / folder_name(at(20))
    manifest = verify(folder)
    assert (manifest.job, manifest.attempt, manifest.step) == ("j", 1, 20)
    assert manifest.layout == {"dp": 2, "pp": 2, "cp": 1, "tp": 2} and manifest.model["dim"] == 24
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    assert there == set(manifest.files) and len(there) == 9  # eight ranks' and DCP's metadata


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata", MANIFEST])
def test_one_flipped_byte_is_refused_and_the_older_one_is_whole(tmp_path: Path, victim: str) -> None:
    save_here(tmp_path, 10, 20)
    path = tmp_path / folder_name(at(20)) / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(CorruptCheckpoint, match=victim.removeprefix(".")):
        load_here(tmp_path, 20)
    newest, older = restorable(inventory(tmp_path), Attempt(1), [])
    assert (newest, older) == (at(20), at(10))
    assert_is_step(load_here(tmp_path, older.step), 10)


def test_a_cut_or_missing_file_is_refused(tmp_path: Path) -> None:
    save_here(tmp_path, 10)
    path = tmp_path / folder_name(at(10)) / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptCheckpoint, match="bytes instead of"):
        load_here(tmp_path, 10)
    path.unlink()
    with pytest.raises(CorruptCheckpoint, match=r"__0_0\.distcp cannot be read"):
        load_here(tmp_path, 10)


def test_every_rank_hears_of_damage_that_one_of_them_found(tmp_path: Path) -> None:
    save_here(tmp_path, 10)
    path = tmp_path / folder_name(at(10)) / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    layout = Layout(dp=3)

    def work(rank: int) -> str:
        try:
            load(tmp_path, at(10), state_of(layout, rank), model=SHAPE, group=group_of(layout))
        except CorruptCheckpoint as error:
            return str(error)
        return ""

    said = forked.run(3, work)
    assert said[0] and "__0_0.distcp" in said[0] and said == [said[0]] * 3


def test_another_model_is_refused_field_by_field(saved: Path) -> None:
    other = ModelShape(layers=4, dim=24, ffn_dim=48, heads=4, kv_heads=4, vocabulary=36, max_seq=8)
    with pytest.raises(InputError, match="ffn_dim is 40 there and 48 here") as caught:
        load(saved, at(20), state_of(Layout(), 0), model=other, group=None)
    assert "max_seq" not in str(caught.value) and "heads" not in caught.value.why


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    save_here(tmp_path, 10)
    path = tmp_path / folder_name(at(10)) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        load_here(tmp_path, 10)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    save_here(tmp_path, 10)
    (tmp_path / folder_name(at(10)) / MANIFEST).unlink()
    assert inventory(tmp_path) == [Found(at=at(10), complete=False)]
    with pytest.raises(InputError, match="no complete checkpoint"):
        load_here(tmp_path, 10)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_write(_: Saver) -> None:
    original = durable.write

    def write(path: Path, content: bytes) -> None:
        if path.name == MANIFEST:
            die()
        original(path, content)

    durable.write = write


def _before(name: str) -> Callable[[Saver], None]:
    return lambda saver: setattr(saver, name, lambda *_: die())


def _before_rename(_: Saver) -> None:
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target.name == MANIFEST:
            die()
        return original(self, target)

    Path.rename = rename  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    "arm",
    [_before("_write_own"), _before("_gather"), _before("_commit"), _at_write, _before_rename],
    ids=["before writing", "after writing", "before commit", "at the manifest", "before its rename"],
)
def test_kill_9_during_a_save_leaves_the_older_one(tmp_path: Path, arm: Callable[[Saver], None]) -> None:
    """Only the process that dies is patched; the test looks at what is left on disk."""
    layout = Layout(dp=2)

    def work(rank: int) -> None:
        saver, state = saver_of(tmp_path, layout, rank)
        assert save(saver, state, 10) == 10
        if rank == 0:
            arm(saver)
            save(saver, state, 20)
            raise AssertionError("rank 0 should be dead")
        state.state.copy_(expected(state.index, state.dp_rank, 20))
        saver.save(20, tokens=0, data=POSITION)
        with pytest.raises(RuntimeError):  # the peer is gone
            saver.close()
        die()

    assert forked.run(2, work, may_die=True) == [None, None]
    assert at(10) in restorable(inventory(tmp_path), Attempt(1), [])
    assert Found(at=at(20), complete=True) not in inventory(tmp_path)
    assert_is_step(load_here(tmp_path, 10), 10)

    # The next attempt clears up, and only what is not complete.
    branches = (Branch(job=JobId("j"), attempt=Attempt(2), parent=at(10)),)
    saver, state = saver_of(tmp_path, Layout(), 0, attempt=2, branches=branches)
    assert save(saver, state, 30) == 30
    assert inventory(tmp_path) == [
        Found(at=at(10), complete=True),
        Found(at=at(30, 2), complete=True),
    ]


def test_nothing_is_committed_without_every_ranks_part(tmp_path: Path) -> None:
    """A rank that dies after its own file was written, and before it could say so."""
    layout = Layout(dp=3)

    def work(rank: int) -> bool:
        saver, state = saver_of(tmp_path, layout, rank)
        assert save(saver, state, 10) == 10
        if rank == 2:
            _before("_gather")(saver)
        state.state.copy_(expected(state.index, state.dp_rank, 20))
        saver.save(20, tokens=0, data=POSITION)
        with pytest.raises(RuntimeError):
            saver.close()
        die()
        return True

    assert forked.run(3, work, may_die=True) == [None] * 3
    assert inventory(tmp_path) == [Found(at=at(10), complete=True), Found(at=at(20), complete=False)]


def test_kill_9_at_any_moment_never_leaves_a_manifest_that_is_not_whole(tmp_path: Path) -> None:
    """Twelve processes that save one checkpoint after the other are killed after random times."""
    source = random.Random(7)
    for attempt in range(1, 13):
        pid = os.fork()
        if pid == 0:
            saver, state = saver_of(tmp_path, Layout(), 0, attempt=attempt, keep=1000)
            for step in range(1, 10_000):
                save(saver, state, step)
            os._exit(1)
        try:
            until = time.monotonic() + 30
            while not any(one.complete and one.at.attempt == attempt for one in inventory(tmp_path)):
                assert time.monotonic() < until
            time.sleep(source.random() * 0.05)  # the moment of the kill is what is being tried
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    complete = [one.at for one in inventory(tmp_path) if one.complete]
    assert len({point.attempt for point in complete}) == 12
    for point in complete:
        verify(tmp_path / folder_name(point), model=None)
        assert_is_step(load_here(tmp_path, point.step, point.attempt), point.step)


def test_a_newer_attempts_fence_stops_the_older_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver, state = saver_of(tmp_path, Layout(), 0)
    assert save(saver, state, 10) == 10
    raise_fence(tmp_path, Attempt(2))
    with caplog.at_level(logging.INFO, "keepstep.checkpoint"):
        assert save(saver, state, 20) == 10
        assert save(saver, state, 30) == 10
    assert inventory(tmp_path) == [Found(at=at(10), complete=True)]
    assert len(caplog.records) == 1 and "attempt 2 has taken over" in caplog.text
    assert saver.failures == 0


def test_a_fence_is_seen_by_every_rank(tmp_path: Path) -> None:
    layout = Layout(tp=2)
    raise_fence(tmp_path, Attempt(5))

    def work(rank: int) -> list[int]:
        saver, state = saver_of(tmp_path, layout, rank, attempt=4)
        return [save(saver, state, 10), save(saver, state, 20)]

    assert forked.run(2, work) == [[-1, -1]] * 2
    assert inventory(tmp_path) == []


def test_a_full_disk_costs_one_checkpoint_and_a_warning(tmp_path: Path) -> None:
    """One rank of two may write no more for a while: a file size limit stands for the full disk."""
    layout = Layout(dp=2)

    def work(rank: int) -> tuple[list[int], int, list[str]]:
        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("keepstep.checkpoint").addHandler(handler)
        saver, state = saver_of(tmp_path, layout, rank)
        reached = [save(saver, state, 10)]
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        reached.append(save(saver, state, 20))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert not (tmp_path / folder_name(at(20))).exists()
        dist.barrier()
        reached.append(save(saver, state, 30))
        return reached, saver.failures, records

    first, second = forked.run(2, work)
    assert first is not None and second is not None
    assert first[:2] == second[:2] == ([10, 10, 30], 1)
    assert len(first[2]) == 1 and second[2] == []
    assert "step 20" in first[2][0] and "rank 1: File too large" in first[2][0]
    assert "the last good one is step 10" in first[2][0]
    assert_is_step(load_here(tmp_path, 30), 30)


def test_retention_keeps_the_newest_of_its_own_chain_and_leaves_others_alone(tmp_path: Path) -> None:
    save_here(tmp_path, 10, 20, 30)
    branches = (Branch(job=JobId("j"), attempt=Attempt(2), parent=at(20)),)
    saver, state = saver_of(tmp_path, Layout(), 0, attempt=2, keep=2, branches=branches)
    for step in (25, 30, 35):
        assert save(saver, state, step) == step
    left = [one.at for one in inventory(tmp_path)]
    # Step 30 of attempt 1 is on the branch that was left: not restorable, and not this attempt's to delete.
    assert left == [at(30), at(30, 2), at(35, 2)]


def test_a_complete_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    save_here(tmp_path, 10)
    before = (tmp_path / folder_name(at(10)) / MANIFEST).read_bytes()
    saver, state = saver_of(tmp_path, Layout(), 0)
    assert save(saver, state, 10) == -1 and saver.failures == 1
    assert (tmp_path / folder_name(at(10)) / MANIFEST).read_bytes() == before
    assert_is_step(load_here(tmp_path, 10), 10)


def test_a_save_blocks_for_the_copy_only_and_says_so(tmp_path: Path) -> None:
    page = mmap.mmap(-1, PAGE)
    session = Session(page, rank=0, world_size=1, attached=True)
    saver, state = saver_of(tmp_path, Layout(), 0, session=session)
    state.state.copy_(expected(state.index, 0, 5))
    saver.save(5, tokens=0, data=POSITION)
    state.state.zero_()  # training goes on at once: the copy is what is written
    assert saver.close() == 5
    assert_is_step(load_here(tmp_path, 5), 5)
    seen = BeaconReader(page).read()
    assert seen is not None and seen.checkpoint_step == 5 and 0 < seen.stall_ns < 2e9
