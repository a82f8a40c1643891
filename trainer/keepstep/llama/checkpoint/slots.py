"""Reading checkpoints that carriers wrote: ranks' slots as they were in memory, in whatever layout.

A slot's description says which rectangle of which tensor lies where, so this is the reading of pieces again,
from files that are mapped instead of parsed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepstep.core import slotfile
from keepstep.core.layout import Layout
from keepstep.core.manifest import Manifest
from keepstep.core.slotfile import Saved
from keepstep.llama.checkpoint.dcp import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Views = dict[MetadataIndex, Tensor]


def open_slots(folder: Path, manifest: Manifest) -> tuple[Metadata, Views]:
    """What a verified checkpoint holds, and each rectangle of it by its tensor's key and offset.

    Errors: InputError for a file that is none of ours.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    views: Views = {}
    for name in sorted(manifest.files):
        saved = slotfile.read(folder / name)
        described = saved.description
        dtype: torch.dtype = getattr(torch, described["dtype"])
        parts = torch.frombuffer(saved.payload, dtype=dtype).view(len(described["parts"]), -1)
        for key, size, offset, tensor in _pieces(saved, described, parts):
            stored = tensors.setdefault(
                key, TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), [])
            )
            chunk = ChunkStorageMetadata(torch.Size(offset), tensor.size())
            stored.chunks.append(chunk)
            views[MetadataIndex(key, chunk.offsets)] = tensor
    return Metadata(tensors), views


def _pieces(
    saved: Saved, described: dict[str, Any], parts: Tensor
) -> list[tuple[str, list[int], list[int], Tensor]]:
    """Key, global shape, offset and content of each; what all tensor parallel ranks have, of the first."""
    first = Layout(**described["layout"]).coordinates(saved.shape.rank).tp == 0
    found = []
    for kind, part in zip(described["parts"], parts, strict=True):
        for name, global_shape, offset, size, start, replicated in described["pieces"]:
            if first or not replicated:
                count = torch.Size(size).numel()
                found.append((f"{kind}.{name}", global_shape, offset, part[start : start + count].view(size)))
    return found
