"""Snapshots in memory for any script, in a few lines:

    from keepstep.session import current

    snapshots = current().snapshots()
    first = 0
    if (found := snapshots.restore()) is not None:
        first, state = found
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(first, last):
        ...                                   # forward, backward, optimizer.step()
        snapshots.take(step + 1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})

Every rank calls `take` for the same steps, each with what it needs to go on: a replica its state, a rank
with a shard its shard. Of a DTensor (FSDP2, tensor parallel) the rank's own part is kept, and becomes one
again where `restore` is shown a state that is laid out the same:

    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    if (found := snapshots.restore(like=state)) is not None:
        first, state = found
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

The job's spec says for how many steps something is done, and turns it on (checkpoint.snapshot_every: 1 step,
say). Outside keepstep, or where there is too little memory, nothing happens and the script's own checkpoints
are what there is.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from keepstep.core.snapshots import Shape, Stamp
from keepstep.session.carrier import EVERY, FOLDER, Carrier
from keepstep.session.progress import Session
from keepstep.session.slots import NOTHING, Says, Slots
from keepstep.session.tree import Packed, sharded, unpack

_DESCRIPTION_BYTES = 1 << 16  # at least: values of a state may grow


class Snapshots:
    def __init__(self, session: Session) -> None:
        self._session = session
        self._on = bool(os.environ.get(FOLDER)) and self._session.attached
        self._attempt = _attempt()
        self._every = max(1, int(os.environ.get(EVERY) or 1))
        self._slots: Slots | None = None
        self._opened = False
        self._shape: Shape | None = None  # of the file that was restored from: kept if the state still fits
        self._group: dist.ProcessGroup | None = None
        self._resumed = -1

    def restore(self, like: Any = None) -> tuple[int, Any] | None:
        """Completed steps and state that this attempt begins from; None: it begins from what the script has.

        Where `like` has a DTensor, so has the state.

        Errors: Unreachable, Refused when the state is in memory and this rank cannot get it.
        """
        if not self._on:
            return None
        carrier = Carrier(Path(os.environ[FOLDER]))
        try:
            begun = carrier.ask(do="begun")[0]["begun"]
            if begun is None:
                return None
            session, at = self._session, Stamp(*begun["at"])
            found = Slots.states(carrier, [session.rank], session.world_size, at)[0]
        finally:
            carrier.close()
        self._shape = found.shape
        self._resumed, state = unpack(found.description, found.payload)
        self._session.resumed(self._resumed)
        return self._resumed, sharded(state, like)

    def take(self, step: int, state: Any) -> bool:
        """Keep the state after `step` completed steps. False: this one was skipped.

        Returns when it is copied: the script may change its state. Errors: InputError for a state that is
        neither tensors nor plain values.
        """
        if not self._on or step % self._every:
            return False
        packed = Packed.of(state)
        description = packed.describe(step)
        self._open(packed.size, len(description))
        self._agree()
        number = self._slots.begin(step) if self._slots else None
        if number is None or self._slots is None:
            return False
        packed.copy_into(self._slots.payload(number))
        self._slots.finish(description, packed.size)
        self._session.snapshotted(step)
        return True

    def close(self) -> None:
        if self._slots is not None:
            self._slots.close()
            self._slots = None

    def _open(self, payload: int, description: int) -> None:
        """Slots of the size that the state has; larger ones when it has grown."""
        shape = self._slots.shape if self._slots else self._shape
        fits = shape is not None and payload <= shape.payload_max and description <= shape.description_max
        if self._opened and (fits or self._slots is None):
            return
        self.close()
        self._opened = True
        self._slots = Slots.open(
            os.environ, rank=self._session.rank, world=self._session.world_size, attempt=self._attempt,
            payload_max=shape.payload_max if fits and shape else payload,
            description_max=(
                shape.description_max if fits and shape else max(_DESCRIPTION_BYTES, 2 * description)
            ),
        )  # fmt: skip
        if self._slots is not None:
            self._slots.resume(self._resumed)

    def _agree(self) -> None:
        """What is sealed, and that everybody has a slot free: over a group that nothing else uses."""
        says: Says = self._slots.says if self._slots else NOTHING
        least = torch.tensor(says, dtype=torch.float64)
        if dist.is_initialized() and dist.get_world_size() > 1:
            if self._group is None:
                group = dist.new_group(backend="gloo")
                assert isinstance(group, dist.ProcessGroup)
                self._group = group
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._group)
        if self._slots is not None:
            self._slots.heard((float(least[0]), float(least[1]), float(least[2])))


def _attempt() -> int:
    """KEEPSTEP_ATTEMPT is job/attempt/node."""
    parts = os.environ.get("KEEPSTEP_ATTEMPT", "").split("/")
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else 1
