"""Saving while training goes on.

Training stops only while the owned state is copied; a thread writes the copy. Every rank writes one file and
syncs it; rank 0 hears from all (over a gloo group that nothing else uses), writes DCP's metadata, looks at
the fence, and commits by renaming the manifest into place. Then all hear what came of it.

    every rank   copy | write, sync ------------+                     +--> known on every rank
    rank 0                                      +-> fence? commit, ---+
                                                    remove old ones

What goes wrong with a disk costs this checkpoint and a warning, not the job: the folder is removed, the last
good one stays. A second save waits for the first, on every rank alike, so that ranks never disagree on
which save they are in.
"""

import itertools
import logging
import queue
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from keepstep.core import durable
from keepstep.core.checkpoints import (
    MANIFEST,
    Branch,
    Point,
    folder_name,
    inventory,
    read_fence,
    restorable,
)
from keepstep.core.errors import KeepstepError, TimedOut
from keepstep.core.ids import Attempt, Step
from keepstep.core.layout import Layout
from keepstep.core.manifest import File, Manifest
from keepstep.llama.checkpoint import dcp
from keepstep.llama.checkpoint.pieces import owned_pieces
from keepstep.llama.checkpoint.storage import (
    Written,
    apart,
    chunks_of,
    described,
    write_chunks,
    write_metadata,
)
from keepstep.llama.flat import FlatState
from keepstep.session import Session

_log = logging.getLogger("keepstep.checkpoint")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a checkpoint says about the job that wrote it."""

    job: str
    attempt: int
    layout: Layout
    model: Any  # a dataclass of the model's sizes
    branches: Sequence[Branch] = ()  # the lineage, this attempt included


@dataclass(frozen=True, slots=True, kw_only=True)
class _Save:
    """One save under way."""

    at: Point
    folder: Path
    tokens: int
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Part:
    """One rank's part of a save, as rank 0 hears of it."""

    written: Written | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Outcome:
    committed: bool = False
    fenced_by: int = 0
    error: str = ""


class Saver:
    """One rank's part in writing an attempt's checkpoints. Every rank calls `save` for the same steps."""

    def __init__(
        self,
        folder: Path,
        state: FlatState,
        identity: Identity,
        *,
        group: dist.ProcessGroup | None,
        session: Session,
        keep: int = 3,
        wait_s: float = 600.0,
    ) -> None:
        """`group` is a gloo group of all ranks for this saver alone; None for a single process."""
        assert keep >= 1, keep
        self._folder, self._state, self._identity = folder, state, identity
        self._group, self._session, self._keep, self._wait_s = group, session, keep, wait_s
        self._rank = 0 if group is None else dist.get_rank(group)
        self._ranks = 1 if group is None else dist.get_world_size(group)
        self._copy = torch.empty(state.state.shape, pin_memory=state.state.is_cuda)
        # Replicated parameters are written by the first tensor parallel rank only.
        at = identity.layout.coordinates(self._rank)
        assert at.dp == state.dp_rank, (at, state.dp_rank)
        pieces = [p for p in owned_pieces(state.index, state.dp_rank) if at.tp == 0 or not p.replicated]
        self._chunks = [apart(chunk) for chunk in chunks_of(self._copy, pieces)]
        self._described = False
        self._metadata: dcp.Metadata | None = None  # on rank 0, without places
        # One thread for all saves: handing it work does not wait for it, starting a thread would.
        self._work: queue.SimpleQueue[_Save | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._failed: BaseException | None = None
        self._outcome = _Outcome()
        self._saved, self._committed, self._reported = -1, -1, -1
        self.failures = 0  # checkpoints that were given up

    def save(self, step: int, *, tokens: int, data: Mapping[str, Any]) -> None:
        """Save the present state, that of `step` completed steps. Returns when it is copied.

        Nothing is done for a step that was saved before or once a newer attempt has taken over.
        """
        begin = time.monotonic_ns()
        self._wait(self._wait_s)
        if self._outcome.fenced_by or step <= self._saved:
            return
        self._saved = step
        self._copy.copy_(self._state.state, non_blocking=True)
        if self._state.state.is_cuda:
            torch.cuda.current_stream().synchronize()
        at = Point(step=Step(step), attempt=Attempt(self._identity.attempt))
        save = _Save(at=at, folder=self._folder / folder_name(at), tokens=tokens, data=dict(data))
        if self._worker is None:
            # A daemon: a process that fails must not wait for peers that may be gone.
            self._worker = threading.Thread(target=self._serve, name="checkpoint", daemon=True)
            self._worker.start()
        self._idle.clear()
        self._work.put(save)
        self._session.stalled(time.monotonic_ns() - begin)

    def poll(self) -> int:
        """The newest committed step of this attempt, -1 before the first; also told to the session."""
        if self._committed != self._reported:
            self._reported = self._committed
            self._session.checkpointed(self._reported)
        return self._reported

    @property
    def busy(self) -> bool:
        return not self._idle.is_set()

    def close(self, wait_s: float | None = None) -> int:
        """Wait for a save under way, end the thread, then `poll`. TimedOut if the save does not end."""
        self._wait(self._wait_s if wait_s is None else wait_s)
        if self._worker is not None:
            self._work.put(None)
            self._worker.join()
            self._worker = None
        return self.poll()

    def _wait(self, wait_s: float) -> None:
        if not self._idle.wait(wait_s):
            raise TimedOut(
                f"the checkpoint of step {self._saved} is not written after {wait_s:g} s",
                where=str(self._folder),
                next="Look at the file system that holds the folder; the job restarts from the last one.",
            )
        if self._failed is not None:  # the ranks can no longer agree: this gang has lost a member
            raise self._failed

    # -- in the thread --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (save := self._work.get()) is not None:
            try:
                self._run(save)
            finally:
                self._idle.set()

    def _run(self, save: _Save) -> None:
        """The thread's outermost boundary: whatever ends a save is raised by the next one, or by close."""
        try:
            self._outcome = self._write(save)
        except BaseException as error:  # noqa: BLE001 - outermost; handed on
            self._failed = error
            return
        if self._outcome.committed:
            self._committed = save.at.step
        if self._outcome.error:
            self.failures += 1

    def _write(self, save: _Save) -> _Outcome:
        if not self._described:
            self._describe()
        parts = self._gather(self._write_own(save.folder))
        return self._tell(None if parts is None else self._commit(save, parts))

    def _describe(self) -> None:
        """Once an attempt: what a rank owns does not change."""
        chunks = self._gather(described(self._chunks))
        if chunks is not None:
            self._metadata = dcp.describe(list(itertools.chain.from_iterable(chunks)))
        self._described = True

    def _write_own(self, folder: Path) -> _Part:
        try:
            if (folder / MANIFEST).exists():
                return _Part(error="there is a complete checkpoint of this step and attempt already")
            folder.mkdir(parents=True, exist_ok=True)
            return _Part(write_chunks(folder, self._rank, self._chunks))
        except (OSError, RuntimeError) as error:  # torch turns some write errors into RuntimeError
            return _Part(error=_sentence(error))

    def _commit(self, save: _Save, parts: list[_Part]) -> _Outcome:
        """On rank 0, when every rank has written and synced its part, or failed to."""
        errors = [f"rank {rank}: {part.error}" for rank, part in enumerate(parts) if part.error]
        if errors:
            return self._give_up(save, "; ".join(errors[:3]))
        try:
            assert self._metadata is not None
            written = [part.written for part in parts if part.written is not None]
            places = {index: place for one in written for index, place in one.places.items()}
            written.append(write_metadata(save.folder, replace(self._metadata, storage_data=places)))
            files = {one.name: one.file for one in written}
            durable.sync_folder(save.folder)
            durable.sync_folder(self._folder)
            fence = read_fence(self._folder)
            if fence is not None and fence > save.at.attempt:
                _remove(save.folder)
                _log.info("step %d is not saved: attempt %d has taken over", save.at.step, fence)
                return _Outcome(fenced_by=fence)
            self._manifest(save, files).write(save.folder)
        except (OSError, KeepstepError) as error:
            return self._give_up(save, _sentence(error))
        self._retain(save.at)
        return _Outcome(committed=True)

    def _manifest(self, save: _Save, files: Mapping[str, File]) -> Manifest:
        layout = self._identity.layout
        return Manifest(
            job=self._identity.job,
            attempt=save.at.attempt,
            step=save.at.step,
            layout={"dp": layout.dp, "pp": layout.pp, "cp": layout.cp, "tp": layout.tp},
            model=as_fields(self._identity.model),
            tokens=save.tokens,
            files=dict(sorted(files.items())),
            data=save.data,
            torch=torch.__version__,
        )

    def _give_up(self, save: _Save, why: str) -> _Outcome:
        _log.warning(
            "the checkpoint of step %d could not be written (%s); training goes on, the last good one is %s",
            save.at.step,
            why,
            f"step {self._committed}" if self._committed >= 0 else "of an earlier attempt, or none",
        )
        if not (save.folder / MANIFEST).exists():
            _remove(save.folder)
        return _Outcome(error=why)

    def _retain(self, newest: Point) -> None:
        """Remove what this attempt's chain no longer needs, and what it or older attempts left incomplete."""
        try:
            found = inventory(self._folder)
            stale = restorable(found, newest.attempt, self._identity.branches)[self._keep :]
            stale += [
                one.at
                for one in found
                if not one.complete
                and (
                    one.at.attempt < newest.attempt or (one.at.attempt == newest.attempt and one.at < newest)
                )
            ]
            for at in stale:
                _remove(self._folder / folder_name(at))
        except OSError as error:
            _log.warning("old checkpoints could not be removed: %s", _sentence(error))

    # -- between ranks --------------------------------------------------------------------------------------

    def _gather(self, value: T) -> list[T] | None:
        """Every rank's value on rank 0, None elsewhere."""
        if self._group is None:
            return [value]
        received: list[Any] | None = [None] * self._ranks if self._rank == 0 else None
        dist.gather_object(value, received, group=self._group, group_dst=0)
        return received

    def _tell(self, outcome: _Outcome | None) -> _Outcome:
        if self._group is not None:
            told: list[Any] = [outcome]
            dist.broadcast_object_list(told, group=self._group, group_src=0)
            outcome = told[0]
        assert outcome is not None
        return outcome


def as_fields(model: Any) -> dict[str, Any]:
    """A model's sizes as a manifest has them."""
    return asdict(model) if is_dataclass(model) and not isinstance(model, type) else dict(model)


def _remove(folder: Path) -> None:
    """Without its manifest first, so that a half removed checkpoint is an incomplete one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
