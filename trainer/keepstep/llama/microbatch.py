"""Cutting sequences into micro-batches, with all that a stage must know about them.

Every stage of a pipeline derives the same micro-batches from (seed, step), so tokens, targets, document
boundaries and positions never travel; only activations do.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keepstep.llama.data import Batch
from keepstep.llama.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Sequences:
    """Some sequences of the global batch."""

    tokens: Tensor  # [sequences, seq + 1] int64
    documents: Tensor  # [sequences, seq] int32: a run of equal numbers is one document
    positions: Tensor  # [sequences, seq] int64: within the document

    @classmethod
    def of(cls, batch: Batch) -> "Sequences":
        return cls(*(torch.from_numpy(part) for part in batch))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MicroBatch:
    """One forward and backward pass. `scale` is 1 / valid tokens of the global batch."""

    tokens: Tensor  # [tokens] int64, the sequences end to end
    targets: Tensor | None  # [tokens] int64, negative: no prediction counts; None: the model gives logits
    scale: float
    cos: Tensor  # [tokens, 1, head_dim/2]
    sin: Tensor
    spans: tuple[int, ...]  # lengths of the documents, end to end
    mask: Any = None  # a flex_attention BlockMask on CUDA

    def __repr__(self) -> str:
        """Short: pipeline schedules put it into their error messages."""
        return f"MicroBatch({len(self.tokens)} tokens, {len(self.spans)} documents)"


class Rotation:
    """Tables of cos and sin by position, [max_seq, head_dim/2]."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        angles = torch.outer(torch.arange(shape.max_seq).float(), 1.0 / shape.rope_theta**exponent)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def targets_of(sequences: Sequences) -> Tensor:
    """[sequences, seq]: the next token, or -100 where it belongs to another document."""
    targets = sequences.tokens[:, 1:].clone()
    crossing = sequences.documents[:, 1:] != sequences.documents[:, :-1]
    targets[:, :-1][crossing] = -100
    return targets


def micro_batches(
    sequences: Sequences, targets: Tensor, *, size: int, scale: float, rotation: Rotation, dtype: torch.dtype
) -> list[MicroBatch]:
    """Consecutive groups of `size` sequences, on the device of the rotation tables."""
    device = rotation.cos.device
    parts = []
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        documents = sequences.documents[rows]
        cos, sin = rotation.at(sequences.positions[rows].reshape(-1).to(device))
        parts.append(
            MicroBatch(
                tokens=sequences.tokens[rows, :-1].reshape(-1).to(device),
                targets=targets[rows].reshape(-1).to(device),
                scale=scale,
                cos=cos.to(dtype),
                sin=sin.to(dtype),
                spans=spans_of(documents),
                mask=_block_mask(documents.to(device)) if device.type == "cuda" else None,
            )
        )
    return parts


def spans_of(documents: Tensor) -> tuple[int, ...]:
    """Lengths of the runs of equal numbers; a run ends with its sequence."""
    starts = torch.ones(documents.shape, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    at = starts.reshape(-1).nonzero().squeeze(1)
    lengths = torch.diff(at, append=torch.tensor([documents.numel()]))
    return tuple(lengths.tolist())


def _block_mask(documents: Tensor) -> Any:
    """Causal within runs of equal documents, for flex_attention over all tokens of a micro-batch."""
    from torch.nn.attention.flex_attention import create_block_mask

    starts = torch.ones_like(documents, dtype=torch.int32)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    run = starts.reshape(-1).cumsum(0)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (run[query] == run[key])

    return create_block_mask(visible, None, None, len(run), len(run), device=str(documents.device))
