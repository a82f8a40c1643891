"""Where weights are: each kind of folder gives any rectangle of any parameter, reading no more than that."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from keepstep.core.checkpoints import MANIFEST
from keepstep.core.errors import InputError
from keepstep.core.manifest import Manifest
from keepstep.llama.checkpoint.storage import KINDS, Chunk, read_chunks
from keepstep.llama.shape import ModelShape
from keepstep.llama.weights.meta import PARAMS, MetaSource
from keepstep.llama.weights.naming import hugging_face_name, shape_of
from keepstep.llama.weights.part import Part

_INDEX, _SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"


class Source(Protocol):
    @property
    def shape(self) -> ModelShape: ...

    def fill(self, parts: Sequence[Part]) -> None:
        """InputError if something is not there."""
        ...


def open_source(folder: Path) -> Source:
    """A keepstep checkpoint, or a folder in Hugging Face's or Meta's format. InputError for anything else."""
    if (folder / MANIFEST).is_file():
        return CheckpointSource(folder)
    if (folder / PARAMS).is_file() and not (folder / CONFIG).is_file():
        return MetaSource(folder, read_json(folder / PARAMS))
    return HuggingFaceSource(folder)


class CheckpointSource:
    """The weights of a checkpoint; its files are the caller's to verify."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.manifest = Manifest.read(folder)
        self.shape = ModelShape.of(self.manifest.model)

    def fill(self, parts: Sequence[Part]) -> None:
        sizes = dict(self.shape.sizes())
        read_chunks(
            self._folder,
            [Chunk(f"{KINDS[0]}.{part.name}", sizes[part.name], part.offset, part.out) for part in parts],
        )


class HuggingFaceSource:
    """config.json and *.safetensors, with or without an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.config = read_json(folder / CONFIG)
        self.shape = shape_of(self.config, str(folder / CONFIG))
        self._sizes = dict(self.shape.sizes())

    def fill(self, parts: Sequence[Part]) -> None:
        files = self.files
        with ExitStack() as stack, torch.no_grad():
            opened: dict[str, Any] = {}
            for part in parts:
                name = hugging_face_name(part.name)
                if name == "lm_head.weight" and name not in files:
                    name = "model.embed_tokens.weight"  # tied there; here it becomes a copy and trains apart
                if name not in files:
                    raise unusable(self._folder, f"{name} is in none of its files")
                file = files[name]
                try:
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(self._folder / file, framework="pt"))
                    self._read(opened[file].get_slice(name), name, part)
                except (SafetensorError, OSError) as error:
                    raise unusable(self._folder, f"{file}: {error}") from error

    def _read(self, stored: Any, name: str, part: Part) -> None:
        size = self._sizes[part.name]
        if tuple(stored.get_shape()) != size:
            raise unusable(self._folder, f"{name} has shape {stored.get_shape()} instead of {list(size)}")
        bounds = zip(part.offset, part.out.shape, strict=True)
        part.out.copy_(stored[tuple(slice(start, start + length) for start, length in bounds)])

    @cached_property
    def files(self) -> Mapping[str, str]:
        """Which file holds each tensor."""
        folder = self._folder
        if (folder / _INDEX).is_file():
            weight_map: Mapping[str, str] = read_json(folder / _INDEX).get("weight_map", {})
            return weight_map
        names = (
            [_SINGLE]
            if (folder / _SINGLE).is_file()
            else sorted(p.name for p in folder.glob("*.safetensors"))
        )
        if not names:
            raise unusable(folder, "it has no *.safetensors")
        found: dict[str, str] = {}
        for name in names:
            try:
                with safe_open(folder / name, framework="pt") as file:
                    found.update(dict.fromkeys(file.keys(), name))
            except (SafetensorError, OSError) as error:
                raise unusable(folder, f"{name}: {error}") from error
        return found


def read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise unusable(path.parent, f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise unusable(path.parent, f"{path.name} is not a JSON object")
    return value


def unusable(folder: Path, why: str) -> InputError:
    return InputError(
        "no weights to start from",
        where=str(folder),
        why=why,
        next="Name a folder in Hugging Face's or Meta's format, or a complete keepstep checkpoint.",
    )
