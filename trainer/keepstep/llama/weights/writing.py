"""A checkpoint as a Hugging Face folder, without any rank: tensor by tensor, file by file.

Never more than one file's tensors are in memory. The folder appears whole, by a rename at the end.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from keepstep.core.errors import InputError
from keepstep.llama.checkpoint import verify
from keepstep.llama.shape import ModelShape
from keepstep.llama.tokenizer import ByteTokenizer
from keepstep.llama.weights.naming import config_of, hugging_face_name
from keepstep.llama.weights.part import Part
from keepstep.llama.weights.reading import check_shape
from keepstep.llama.weights.sources import CheckpointSource, Source, open_source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FILE_BYTES = 4 << 30  # of tensors in one file


def export(
    checkpoint: Path, out: Path, *, dtype: str = "float32", file_bytes: int = _FILE_BYTES
) -> ModelShape:
    """Write `out` for transformers' from_pretrained. InputError or CorruptCheckpoint if it cannot be done."""
    verify(checkpoint)
    return publish(CheckpointSource(checkpoint), out, dtype=dtype, file_bytes=file_bytes)


def average(folders: Sequence[Path], out: Path, *, dtype: str = "float32") -> ModelShape:
    """Write the mean of the weights of some folders of any format, as the paper makes its final models."""
    sources = [open_source(folder) for folder in folders]
    if len(sources) < 2:
        raise InputError("there is nothing to average", where="average", next="Name two folders or more.")
    for folder, source in zip(folders, sources, strict=True):
        check_shape(source.shape, sources[0].shape, folder)
        if isinstance(source, CheckpointSource):
            verify(folder)
    return publish(_Mean(sources), out, dtype=dtype)


class _Mean:
    """A source that is the mean of others."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.shape, self._sources = sources[0].shape, sources

    def fill(self, parts: Sequence[Part]) -> None:
        for part in parts:
            total = torch.zeros(part.out.shape, dtype=torch.float64)
            one = torch.empty(part.out.shape)
            for source in self._sources:
                source.fill([Part(part.name, part.offset, one)])
                total += one
            part.out.copy_(total / len(self._sources))


def publish(source: Source, out: Path, *, dtype: str, file_bytes: int = _FILE_BYTES) -> ModelShape:
    """Write a source's weights as a Hugging Face folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            "exists already", where=str(out), why="it is not an empty folder", next="Name a new folder."
        )
    if dtype not in DTYPES:
        raise InputError(
            f"{dtype!r} is no type of weights", where="dtype", next=f"Use one of {list(DTYPES)}."
        )

    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(source, partial, dtype, file_bytes)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return source.shape


def _write(source: Source, folder: Path, dtype: str, file_bytes: int) -> None:
    shape, sizes = source.shape, dict(source.shape.sizes())
    groups = list(_groups(shape, DTYPES[dtype].itemsize, file_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(groups, start=1):
        file = (
            f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        )
        whole = {name: torch.empty(sizes[name], dtype=DTYPES[dtype]) for name in names}
        source.fill([Part(name, (0,) * tensor.dim(), tensor) for name, tensor in whole.items()])
        tensors = {hugging_face_name(name): tensor for name, tensor in whole.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(groups) > 1:
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    special = None
    if shape.vocabulary == ByteTokenizer.vocabulary:
        special = {"bos": ByteTokenizer.bos, "eos": ByteTokenizer.eos, "pad": ByteTokenizer.pad}
    _write_json(folder / "config.json", config_of(shape, dtype=dtype, special=special))


def _groups(shape: ModelShape, itemsize: int, file_bytes: int) -> Iterator[list[str]]:
    """Canonical names, file by file; a tensor that is larger than a file gets one of its own."""
    names: list[str] = []
    used = 0
    for name, size in shape.sizes():
        nbytes = itemsize * torch.Size(size).numel()
        if names and used + nbytes > file_bytes:
            yield names
            names, used = [], 0
        names.append(name)
        used += nbytes
    yield names


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
