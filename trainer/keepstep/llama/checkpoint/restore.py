"""Loading a checkpoint into whatever layout the job has now."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from keepstep.core.checkpoints import MANIFEST, Point, folder_name
from keepstep.core.errors import KeepstepError
from keepstep.core.manifest import Manifest, corrupt
from keepstep.llama.checkpoint.pieces import owned_pieces
from keepstep.llama.checkpoint.saver import as_fields
from keepstep.llama.checkpoint.storage import chunks_of, read_chunks
from keepstep.llama.flat import FlatState


@dataclass(frozen=True, slots=True)
class _Checked:
    """What one rank found; all of them come to the same conclusion."""

    damage: tuple[str, ...] = ()
    error: Exception | None = None


def load(
    folder: Path, at: Point, state: FlatState, *, model: Any, group: dist.ProcessGroup | None
) -> Manifest:
    """Fill the owned weights and moments and set the step; every rank calls it, in any layout.

    Files are verified before anything is read, each by one rank. Raises the same on every rank: InputError
    if the checkpoint is incomplete, of another model or of a newer format; CorruptCheckpoint, naming the
    files, if it is damaged: then `core.checkpoints.restorable` names the next older one. The compute copy
    (`state.weights`) is the caller's to refresh, by the gather that also follows an update.
    """
    path = folder / folder_name(at)
    manifest = verify(path, model=as_fields(model), group=group)
    fill(path, state)
    state.step = manifest.step
    return manifest


def verify(
    path: Path, *, model: Mapping[str, Any] | None = None, group: dist.ProcessGroup | None = None
) -> Manifest:
    """The manifest of a whole checkpoint. The ranks of the group share the work and the verdict."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    manifest: Manifest | None = None
    try:
        manifest = Manifest.read(path)
        if model is not None:
            manifest.check_model(model, path / MANIFEST)
        share = sorted(manifest.files)[rank::ranks]
        found = _Checked(damage=tuple(manifest.damage(path, share)))
    except (OSError, KeepstepError) as error:  # raised below, by every rank alike
        found = _Checked(error=error)
    checked = [found]
    if group is not None:
        received: list[Any] = [None] * ranks
        dist.all_gather_object(received, found, group=group)
        checked = received
    for one in checked:
        if one.error is not None:
            raise one.error
    if damage := [sentence for one in checked for sentence in one.damage]:
        raise corrupt(path, damage)
    assert manifest is not None
    return manifest


def fill(path: Path, state: FlatState) -> None:
    """Read what a rank owns from a verified checkpoint."""
    read_chunks(path, chunks_of(state.state, owned_pieces(state.index, state.dp_rank)))
