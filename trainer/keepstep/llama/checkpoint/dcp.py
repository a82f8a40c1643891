"""The metadata of PyTorch's distributed checkpoint format (DCP), without the package of that name.

torch.distributed.checkpoint brings DTensor, FX and SymPy along: half as much again as torch itself takes to
be imported. A checkpoint needs six small classes of it, pickled under torch's names. They are here with the
same fields; tests have torch read what this writes, and this read what torch wrote.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch

from keepstep.core.errors import InputError

METADATA = ".metadata"  # the file's name
_VERSION = "1.0.0"


@dataclass(frozen=True)
class ChunkStorageMetadata:
    """A rectangle of a tensor."""

    offsets: torch.Size
    sizes: torch.Size


class MemoryFormat(Enum):
    CONTIGUOUS = 0
    CHANNELS_LAST = 1
    PRESERVE = 2


@dataclass
class TensorProperties:
    dtype: torch.dtype

    def __getstate__(self) -> tuple[object, ...]:
        """dtype, layout, requires_grad, memory format, pinned, strides: torch's order, and its defaults."""
        return self.dtype, torch.strided, False, MemoryFormat.CONTIGUOUS, False, None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


@dataclass(frozen=True)
class TensorStorageMetadata:
    properties: TensorProperties
    size: torch.Size
    chunks: list[ChunkStorageMetadata]


@dataclass(frozen=True)
class MetadataIndex:
    """Names a chunk: the tensor's key and the chunk's first element. `index` is a hint of torch's."""

    fqn: str
    offset: torch.Size
    index: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class StorageInfo:
    """The bytes of a file that hold a chunk, as torch.save wrote it."""

    relative_path: str
    offset: int
    length: int


@dataclass(frozen=True)
class Metadata:
    state_dict_metadata: dict[str, TensorStorageMetadata]
    planner_data: None = None
    storage_data: Mapping[MetadataIndex, StorageInfo] = field(default_factory=dict)
    storage_meta: object = None
    version: str = _VERSION


class _Ignored:
    """Stands for what is in the file and not read here."""

    def __init__(self, *_: object) -> None: ...


_TORCH = "torch.distributed.checkpoint"
_NAMES: dict[tuple[str, str], type] = {
    (f"{_TORCH}.metadata", "ChunkStorageMetadata"): ChunkStorageMetadata,
    (f"{_TORCH}.metadata", "_MEM_FORMAT_ENCODING"): MemoryFormat,
    (f"{_TORCH}.metadata", "TensorProperties"): TensorProperties,
    (f"{_TORCH}.metadata", "TensorStorageMetadata"): TensorStorageMetadata,
    (f"{_TORCH}.metadata", "MetadataIndex"): MetadataIndex,
    (f"{_TORCH}.metadata", "Metadata"): Metadata,
    (f"{_TORCH}.filesystem", "_StorageInfo"): StorageInfo,
}
# What torch's own writer says of itself: where and under which number it wrote.
_IGNORED = {(f"{_TORCH}.metadata", "StorageMeta"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}


def dumps(metadata: Metadata) -> bytes:
    """The content of the metadata's file, with torch's names for the classes."""
    # Up to protocol 3 a class is its module and name on a line each, wherever it is named first.
    content = pickle.dumps(metadata, protocol=3)
    for (module, name), one in _NAMES.items():
        here = f"c{one.__module__}\n{one.__qualname__}\n".encode()
        assert content.count(here) <= 1, here
        content = content.replace(here, f"c{module}\n{name}\n".encode())
    return content


def read(folder: Path) -> Metadata:
    """InputError if it is not the metadata of tensors."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"{path} is not the metadata of a checkpoint of tensors",
            where="restore",
            why=str(error),
            next="Restore a checkpoint that keepstep wrote.",
        ) from error
    return cast("Metadata", metadata)


class _Unpickler(pickle.Unpickler):
    """Makes the classes above and torch's plain values, and nothing else: a pickle may ask for anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _IGNORED:
            return _Ignored
        if one := _NAMES.get((module, name)):
            return one
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _Ignored
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def describe(chunks: Sequence[tuple[str, torch.dtype, torch.Size, ChunkStorageMetadata]]) -> Metadata:
    """All ranks' chunks (key, dtype, the tensor's size, rectangle), which fill their tensors exactly."""
    tensors: dict[str, TensorStorageMetadata] = {}
    for key, dtype, size, chunk in chunks:
        tensors.setdefault(key, TensorStorageMetadata(TensorProperties(dtype), size, [])).chunks.append(chunk)
    for key, tensor in tensors.items():
        assert sum(chunk.sizes.numel() for chunk in tensor.chunks) == tensor.size.numel(), key
        assert not any(_overlaps(tensor.chunks)), key
    return Metadata(tensors)


def overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> ChunkStorageMetadata | None:
    """The rectangle that both have, in the tensor's coordinates."""
    offsets = torch.Size(map(max, one.offsets, other.offsets))
    ends = map(min, _ends(one), _ends(other))
    sizes = [end - offset for end, offset in zip(ends, offsets, strict=True)]
    return ChunkStorageMetadata(offsets, torch.Size(sizes)) if min(sizes) > 0 else None


def _ends(chunk: ChunkStorageMetadata) -> list[int]:
    return [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]


def _overlaps(chunks: Sequence[ChunkStorageMetadata]) -> Iterator[ChunkStorageMetadata]:
    """Swept along the first dimension: only those that reach as far are looked at."""
    open_: list[ChunkStorageMetadata] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets):
        open_ = [other for other in open_ if other.offsets[0] + other.sizes[0] > chunk.offsets[0]]
        yield from filter(None, (overlap(chunk, other) for other in open_))
        open_.append(chunk)
