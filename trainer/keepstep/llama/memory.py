"""The trainer's snapshots in memory: one copy of the owned state after each step, and back.

The owned state is one contiguous tensor, so a snapshot is one copy. On a GPU it goes to pinned memory on a
stream of its own while the next step computes, and is waited for at the gate; on a CPU it is made at once.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from keepstep.core.errors import Unreachable
from keepstep.core.layout import Layout
from keepstep.core.snapshots import Stamp
from keepstep.llama.checkpoint.pieces import owned_pieces
from keepstep.llama.flat import FlatState
from keepstep.llama.job import TrainJob
from keepstep.session import Session
from keepstep.session.slots import NOTHING, Says, Slots

_VALUES_BYTES = 4096  # of a description, for what changes with the step


class Snapshots:
    """Silent (nothing is taken) where there are no slots: other ranks learn of it by what this one says."""

    def __init__(
        self, job: TrainJob, state: FlatState, session: Session, values: Callable[[int], dict[str, Any]]
    ) -> None:
        """`values`: what belongs to the state after a step beside its tensors, as JSON: tokens, data."""
        self._state, self._session, self._values = state, session, values
        self._every = job.snapshot_every  # steps; None: as often as it can be afforded
        self._fixed = json.dumps(_description(job, state))
        self._bytes = state.state.numel() * state.state.element_size()
        self.slots: Slots | None = None
        if self._every != 0:
            self.slots = Slots.open(
                os.environ, rank=session.rank, world=job.layout.world_size, attempt=job.attempt,
                description_max=len(self._fixed) + _VALUES_BYTES, payload_max=self._bytes,
            )  # fmt: skip
        numbers = range(self.slots.shape.slots) if self.slots else ()
        self._targets = [self._target(number) for number in numbers]
        on_device = state.state.is_cuda and self.slots is not None
        self._stream = torch.cuda.Stream() if on_device else None  # type: ignore[no-untyped-call]
        self._under_way: int | None = None  # the step whose copy is not finished
        self._stall_ns = 0  # of that copy

    @property
    def says(self) -> Says:
        return self.slots.says if self.slots else NOTHING

    def heard(self, least: tuple[float, ...]) -> None:
        if self.slots:
            self.slots.heard((least[0], least[1], least[2]))

    def resume(self, step: int) -> None:
        """The state that the attempt begins from is protected before its first step."""
        if self.slots and not self.slots.resume(step):
            self._begin(step)
            self.complete()

    def take(self, step: int) -> None:
        """After an update: begin the copy."""
        if self.slots and (self.slots.due(step) if self._every is None else step % self._every == 0):
            self._begin(step)

    def _begin(self, step: int) -> None:
        number = self.slots.begin(step) if self.slots else None
        if number is None:
            return
        begun = time.monotonic_ns()
        self._under_way, self._stall_ns = step, 0
        if self._stream is None:
            self._targets[number].copy_(self._state.state)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._targets[number].copy_(self._state.state, non_blocking=True)
        self._stood_still(time.monotonic_ns() - begun)
        if self._stream is None:
            self.complete()

    def complete(self) -> None:
        """The gate: before the next gradient collective the copy is whole."""
        if self._under_way is None:
            return
        assert self.slots is not None
        begun = time.monotonic_ns()
        step, self._under_way = self._under_way, None
        if self._stream is not None:
            self._stream.synchronize()
        values = json.dumps(self._values(step))
        self.slots.finish(f'{{"values":{values},{self._fixed[1:]}'.encode(), self._bytes)
        self._session.snapshotted(step)
        self._stood_still(time.monotonic_ns() - begun)
        self.slots.stalled(self._stall_ns / 1e9)

    def _stood_still(self, ns: int) -> None:
        self._stall_ns += ns
        self._session.stalled(ns)

    def close(self) -> None:
        if self.slots:
            self.slots.close()

    def _target(self, number: int) -> Tensor:
        assert self.slots is not None
        target = torch.frombuffer(self.slots.payload(number), dtype=self._state.state.dtype)
        if self._state.state.is_cuda:  # page-locked, or the copy would not be asynchronous
            torch.cuda.cudart().cudaHostRegister(target.data_ptr(), self._bytes, 0)  # type: ignore[no-untyped-call]
        return target


def load(job: TrainJob, state: FlatState, slots: Slots | None, *, dp_rank: int) -> dict[str, Any]:
    """Fill the owned state from memory, in whatever layout it was taken; the values that belong to it.

    Errors: Unreachable where this rank has no carrier.
    """
    assert job.restore is not None
    assert job.memory is not None
    if slots is None:
        raise Unreachable("the state to begin from is in memory, and this rank has no carrier")
    at = Stamp(job.restore.attempt, job.restore.step)
    old, index = job.memory, state.index
    replicas = job.layout.sources(old, dp_rank)
    coordinates = job.layout.coordinates(slots.shape.rank)
    ranks = [int(old.rank(dp=dp, pp=coordinates.pp, cp=coordinates.cp, tp=coordinates.tp)) for dp in replicas]
    found = slots.load(ranks, old.world_size, at)
    # Replicas share out the same segment of each unit, however many they are: positions are within it.
    parts = state.state.view(3, -1)
    for dp, held in zip(replicas, found, strict=True):
        theirs = torch.frombuffer(held.payload, dtype=state.state.dtype).view(3, -1)
        for unit in index.units:
            size = len(unit) // index.cp
            ours, begin = dp_rank * size // index.dp, dp * size // old.dp
            first, last = max(ours, begin), min(ours + size // index.dp, begin + size // old.dp)
            to, start = index.local(unit).start - ours, unit.start // (index.cp * old.dp) - begin
            parts[:, to + first : to + last].copy_(theirs[:, start + first : start + last])
    state.step = job.restore.step
    values: dict[str, Any] = json.loads(found[0].description)["values"]
    return values


def _description(job: TrainJob, state: FlatState) -> dict[str, Any]:
    """Enough to load the payload, or to write it to storage, without knowing the trainer."""
    layout: Layout = job.layout
    return {
        "job": job.id,
        "model": asdict(job.shape),
        "torch": torch.__version__,
        "layout": {"dp": layout.dp, "pp": layout.pp, "cp": layout.cp, "tp": layout.tp},
        "dtype": str(state.state.dtype).removeprefix("torch."),
        "parts": ["model", "optimizer.exp_avg", "optimizer.exp_avg_sq"],
        "pieces": [
            [p.name, p.global_shape, p.offset, p.size, p.start, p.replicated]
            for p in owned_pieces(state.index, state.dp_rank)
        ],
    }
