"""Pieces in PyTorch's distributed checkpoint format (DCP): each rank's in a file, which torch's tools read.

A rank writes its pieces one after the other as torch.save does, and says where each lies; rank 0 writes that
down (`dcp`). What a rank owns never changes within an attempt, so who writes what needs no planning.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash
from torch import Tensor

from keepstep.core.errors import InputError
from keepstep.core.manifest import SLOTS, File, Manifest
from keepstep.llama.checkpoint import dcp
from keepstep.llama.checkpoint.dcp import ChunkStorageMetadata, MetadataIndex, StorageInfo
from keepstep.llama.checkpoint.pieces import Piece
from keepstep.llama.checkpoint.slots import open_slots

# What a piece is called in a checkpoint, in the order in which a rank's state has the three parts.
KINDS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a global tensor, and the memory that holds it."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


def chunks_of(state: Tensor, pieces: Sequence[Piece], kinds: Sequence[str] = KINDS) -> list[Chunk]:
    """The pieces of a rank's state [len(kinds) * shard] as views of it."""
    return [
        Chunk(
            f"{kind}.{piece.name}",
            piece.global_shape,
            piece.offset,
            part[piece.start : piece.start + piece.numel].view(piece.size),
        )
        for kind, part in zip(kinds, state.chunk(len(kinds)), strict=True)
        for piece in pieces
    ]


def apart(chunk: Chunk) -> Chunk:
    """The same memory as a tensor with a storage of its own, which torch's writer does not have to copy."""
    tensor = chunk.tensor
    own = torch.frombuffer(tensor.view(-1).numpy(), dtype=tensor.dtype).view(tensor.shape)
    return replace(chunk, tensor=own)


@dataclass(frozen=True, slots=True)
class Written:
    """A file of a checkpoint as it was handed over for writing, not as a disk may give it back."""

    name: str
    file: File
    places: Mapping[MetadataIndex, StorageInfo] = field(default_factory=dict)


def described(chunks: Sequence[Chunk]) -> list[tuple[str, torch.dtype, torch.Size, ChunkStorageMetadata]]:
    """What `dcp.describe` needs to know of a rank's chunks."""
    return [(c.key, c.tensor.dtype, torch.Size(c.global_shape), _bounds(c)) for c in chunks]


def write_chunks(folder: Path, rank: int, chunks: Sequence[Chunk]) -> Written:
    """A rank's file, synced. Errors: OSError, or RuntimeError from torch.save."""
    name, places = f"__{rank}_0.distcp", {}
    with (folder / name).open("wb") as file:
        stream = _Stream(file)
        for chunk in chunks:
            offset = stream.count
            torch.save(chunk.tensor, cast("IO[bytes]", stream))
            index = MetadataIndex(chunk.key, torch.Size(chunk.offset))
            places[index] = StorageInfo(name, offset, stream.count - offset)
        _sync(file)
    return Written(name, stream.summed, places)


def write_metadata(folder: Path, metadata: dcp.Metadata) -> Written:
    """Under another name first: the file is there as a whole or not at all."""
    unfinished = folder / f"{dcp.METADATA}.tmp"
    with unfinished.open("wb") as file:
        stream = _Stream(file)
        stream.write(dcp.dumps(metadata))
        _sync(file)
    unfinished.rename(folder / dcp.METADATA)
    return Written(dcp.METADATA, stream.summed)


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Stream(io.RawIOBase):
    """Sequential writes only, which is all that torch.save asks of a stream."""

    def __init__(self, file: io.BufferedWriter) -> None:
        super().__init__()
        self._file, self._digest, self.count = file, xxhash.xxh3_64(), 0

    @property
    def summed(self) -> File:
        return File(bytes=self.count, xxh3=self._digest.hexdigest())

    def write(self, data: Any) -> int:
        self._digest.update(data)
        written = self._file.write(data)
        self.count += written
        return written

    def tell(self) -> int:
        return self.count

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def writable(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a stored chunk, and where it belongs."""

    index: MetadataIndex  # of the chunk
    offsets: Sequence[int]  # in it
    into: Tensor


def read_chunks(folder: Path, chunks: Sequence[Chunk]) -> None:
    """Fill chunks from a checkpoint, without any other rank. InputError if something is not in it."""
    manifest = Manifest.read(folder)
    if manifest.form == SLOTS:
        metadata, views = open_slots(folder, manifest)
        for part in _parts(metadata, chunks):
            _copy(views[part.index], part)
        return
    metadata = dcp.read(folder)
    files: dict[str, list[_Part]] = {}
    for part in _parts(metadata, chunks):
        files.setdefault(metadata.storage_data[part.index].relative_path, []).append(part)
    for name, parts in files.items():
        with (folder / name).open("rb") as file:
            for part in parts:
                place = metadata.storage_data[part.index]
                file.seek(place.offset)
                content = io.BytesIO(file.read(place.length))
                _copy(torch.load(content, map_location="cpu", weights_only=True), part)


def _parts(metadata: dcp.Metadata, chunks: Sequence[Chunk]) -> list[_Part]:
    """What fills the chunks, from whatever layout wrote it. InputError if any element is lacking."""
    found = []
    for chunk in chunks:
        stored = metadata.state_dict_metadata.get(chunk.key)
        if stored is None or tuple(stored.size) != chunk.global_shape:
            size = None if stored is None else tuple(stored.size)
            raise _lacking(chunk.key, f"shape {size} there, {chunk.global_shape} here")
        there = 0
        for other in stored.chunks:
            if (both := dcp.overlap(_bounds(chunk), other)) is None:
                continue
            there += both.sizes.numel()
            into = _narrow(chunk.tensor, _minus(both.offsets, chunk.offset), both.sizes)
            index = MetadataIndex(chunk.key, other.offsets)
            found.append(_Part(index, _minus(both.offsets, other.offsets), into))
        if there != chunk.tensor.numel():
            raise _lacking(chunk.key, f"{there:,} of {chunk.tensor.numel():,} elements are there")
    return found


def _copy(stored: Tensor, part: _Part) -> None:
    part.into.copy_(_narrow(stored, part.offsets, part.into.shape))


def _narrow(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _minus(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _bounds(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(chunk.offset), sizes=chunk.tensor.size())


def _lacking(key: str, why: str) -> InputError:
    return InputError(
        f"the checkpoint does not hold {key} as it is needed",
        where="restore",
        why=why,
        next="Restore a checkpoint of the same model.",
    )
