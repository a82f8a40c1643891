"""Pieces in PyTorch's distributed checkpoint format (DCP).

Only DCP's public parts are used: its plans, file writer and reader, and its resharding arithmetic. A plan is
made of pieces directly instead of from a state dict, and is exchanged once and then reused, because what a
rank owns never changes within an attempt. The result is a plain DCP folder: torch's own tools read it.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from keepstep.core.errors import InputError
from keepstep.core.manifest import SLOTS, File, Manifest
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


class SavePieces(DefaultSavePlanner):
    """Plans and finds what a rank writes; the global plan (and its check for holes) is torch's own."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {MetadataIndex(chunk.key, chunk.offset): chunk for chunk in chunks}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        raise NotImplementedError("pieces are given at construction")

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                WriteItem(
                    index=index,
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=_bounds(chunk),
                        properties=TensorProperties.create_from_tensor(chunk.tensor),
                        size=torch.Size(chunk.global_shape),
                    ),
                )
                for index, chunk in self._chunks.items()
            ]
        )

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._chunks[write_item.index].tensor


class LoadPieces(LoadPlanner):
    """Plans what a rank reads, from whatever layout wrote it, and puts it in its place."""

    def __init__(self, chunks: Sequence[Chunk], metadata: Metadata) -> None:
        self._chunks = {MetadataIndex(chunk.key, chunk.offset): chunk for chunk in chunks}
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """InputError if the checkpoint lacks any element of a chunk."""
        by_key: dict[str, list[Chunk]] = {}
        for chunk in self._chunks.values():
            by_key.setdefault(chunk.key, []).append(chunk)
        items: list[ReadItem] = []
        for key, chunks in by_key.items():
            stored = self._metadata.state_dict_metadata.get(key)
            if not isinstance(stored, TensorStorageMetadata) or tuple(stored.size) != chunks[0].global_shape:
                size = None if not isinstance(stored, TensorStorageMetadata) else tuple(stored.size)
                raise _lacking(key, f"shape {size} there, {chunks[0].global_shape} here")
            found = create_read_items_for_chunk_list(key, stored, [_bounds(chunk) for chunk in chunks])
            there, needed = sum(i.lengths.numel() for i in found), sum(c.tensor.numel() for c in chunks)
            if there != needed:
                raise _lacking(key, f"{there:,} of {needed:,} elements are there")
            items += found
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self._chunks[read_item.dest_index].tensor
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # it was read into its place

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        raise NotImplementedError("pieces are given at construction")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("a checkpoint has tensors only")

    def resolve_bytes(self, read_item: ReadItem) -> io.BytesIO:
        raise NotImplementedError("a checkpoint has tensors only")


class Writer(FileSystemWriter):
    """torch's writer into one folder, that knows the checksums of what it wrote."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files: dict[str, File] = {}
        self.fs = _Checksumming(self.files)


class _Checksumming(FileSystem):
    """Sums what is handed over for writing, not what a disk may give back."""

    def __init__(self, files: dict[str, File]) -> None:
        self._files = files

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", mode
        with Path(path).open("wb") as file:
            stream = _Stream(file)
            yield stream
            # The metadata is written under another name and renamed.
            name = Path(path).name.removesuffix(".tmp")
            self._files[name] = File(bytes=stream.count, xxh3=stream.digest.hexdigest())


class _Stream(io.RawIOBase):
    """Sequential writes only, which is all that torch.save and pickle ask of a stream."""

    def __init__(self, file: io.BufferedWriter) -> None:
        super().__init__()
        self._file, self.digest, self.count = file, xxhash.xxh3_64(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
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


def read_chunks(folder: Path, chunks: Sequence[Chunk]) -> None:
    """Fill chunks from a checkpoint, without any other rank. InputError if something is not in it."""
    manifest = Manifest.read(folder)
    if manifest.form == SLOTS:
        _read_slots(folder, manifest, chunks)
        return
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner = LoadPieces(chunks, metadata)
    reader.read_data(planner.create_local_plan(), planner).wait()


def _read_slots(folder: Path, manifest: Manifest, chunks: Sequence[Chunk]) -> None:
    metadata, views = open_slots(folder, manifest)
    planner = LoadPieces(chunks, metadata)
    for item in planner.create_local_plan().items:
        offset = item.storage_index.offset
        assert offset is not None
        part = views[item.storage_index.fqn, offset]
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        planner.resolve_tensor(item).copy_(part)


def stored_shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its key."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {key: tuple(cast("TensorStorageMetadata", value).size) for key, value in stored.items()}


def _bounds(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(chunk.offset), sizes=chunk.tensor.size())


def _lacking(key: str, why: str) -> InputError:
    return InputError(
        f"the checkpoint does not hold {key} as it is needed",
        where="restore",
        why=why,
        next="Restore a checkpoint of the same model.",
    )
