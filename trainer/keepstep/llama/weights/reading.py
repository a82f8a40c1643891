"""Starting from weights that exist: each rank reads just the rectangles that it owns.

From a folder in Hugging Face's format (config.json, *.safetensors, with or without an index), or from a
keepstep checkpoint, whose moments are left aside.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from keepstep.core.checkpoints import MANIFEST
from keepstep.core.errors import InputError
from keepstep.llama.checkpoint import verify
from keepstep.llama.checkpoint.pieces import owned_pieces
from keepstep.llama.checkpoint.saver import as_fields
from keepstep.llama.checkpoint.storage import KINDS, chunks_of, read_chunks
from keepstep.llama.flat import FlatState
from keepstep.llama.shape import ModelShape
from keepstep.llama.weights.naming import hugging_face_name, shape_of

_INDEX, _SINGLE, _CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"


def init_from(
    folder: Path, state: FlatState, shape: ModelShape, *, group: dist.ProcessGroup | None = None
) -> None:
    """Fill the owned master weights; moments and step stay at zero. Every rank calls it.

    `group` lets the ranks share the check of a keepstep checkpoint. InputError if the folder holds no
    weights, or those of another model. `state.weights` is the caller's to refresh.
    """
    if (folder / MANIFEST).is_file():
        verify(folder, model=as_fields(shape), group=group)
        pieces = owned_pieces(state.index, state.dp_rank)
        read_chunks(folder, chunks_of(state.master, pieces, KINDS[:1]))
        return
    check_shape(folder, shape)
    _fill(folder, state)


def check_shape(folder: Path, shape: ModelShape) -> None:
    """InputError that names every field in which a Hugging Face folder's model is another one."""
    path = folder / _CONFIG
    there = shape_of(_read_json(path), str(path))
    different = [
        f"{field.name} is {getattr(there, field.name)} there and {getattr(shape, field.name)} here"
        for field in fields(ModelShape)
        if field.name != "max_seq" and getattr(there, field.name) != getattr(shape, field.name)
    ]
    if different:
        raise InputError(
            "the weights are of another model",
            where=str(path),
            why="; ".join(different),
            next="Set the model of the job to the sizes of the weights.",
        )


def _fill(folder: Path, state: FlatState) -> None:
    files = _files(folder)
    with ExitStack() as stack, torch.no_grad():
        opened: dict[str, Any] = {}
        for piece in owned_pieces(state.index, state.dp_rank):
            name = hugging_face_name(piece.name)
            if name == "lm_head.weight" and name not in files:
                name = "model.embed_tokens.weight"  # tied there; here it becomes a copy and trains apart
            if name not in files:
                raise _unusable(folder, f"{name} is in none of its files")
            file = files[name]
            try:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
                stored = opened[file].get_slice(name)
                if tuple(stored.get_shape()) != piece.global_shape:
                    raise _unusable(
                        folder, f"{name} has shape {stored.get_shape()} instead of {list(piece.global_shape)}"
                    )
                bounds = zip(piece.offset, piece.size, strict=True)
                part = stored[tuple(slice(start, start + length) for start, length in bounds)]
            except (SafetensorError, OSError) as error:
                raise _unusable(folder, f"{file}: {error}") from error
            state.master[piece.start : piece.start + piece.numel].view(piece.size).copy_(part)


def _files(folder: Path) -> Mapping[str, str]:
    """Which file holds each tensor."""
    if (folder / _INDEX).is_file():
        weight_map: Mapping[str, str] = _read_json(folder / _INDEX).get("weight_map", {})
        return weight_map
    names = (
        [_SINGLE] if (folder / _SINGLE).is_file() else sorted(p.name for p in folder.glob("*.safetensors"))
    )
    if not names:
        raise _unusable(folder, "it has no *.safetensors")
    found: dict[str, str] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), name))
        except (SafetensorError, OSError) as error:
            raise _unusable(folder, f"{name}: {error}") from error
    return found


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unusable(path.parent, f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise _unusable(path.parent, f"{path.name} is not a JSON object")
    return value


def _unusable(folder: Path, why: str) -> InputError:
    return InputError(
        "no weights to start from",
        where=str(folder),
        why=why,
        next="Name a folder with config.json and *.safetensors, or a complete keepstep checkpoint.",
    )
