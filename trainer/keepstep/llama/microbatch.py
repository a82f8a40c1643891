"""Cutting sequences into micro-batches, with all that a stage must know about them.

Every stage of a pipeline derives the same micro-batches from (seed, step), so tokens, targets, document
boundaries and positions never travel; only activations do.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keepstep.llama.data import Batch
from keepstep.llama.shape import ModelShape

Window = tuple[int, int, int]  # how many queries, and from where to where the last one's keys are


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
    spans: tuple[int, ...]  # lengths of the documents, end to end; of the whole sequences
    order: Tensor | None = (
        None  # [all tokens]: where each is among those gathered over context parallel ranks
    )
    windows: tuple[Window, ...] = ()  # see windows_of; empty where no context is cut
    mask: Any = None  # a flex_attention BlockMask on CUDA

    def __repr__(self) -> str:
        """Short: pipeline schedules put it into their error messages."""
        return f"MicroBatch({len(self.tokens)} tokens, {len(self.spans)} documents)"


class Rotation:
    """Tables of cos and sin by position, [max_seq, head_dim/2]."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        angles = torch.outer(torch.arange(shape.max_seq).float(), frequencies(shape))
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def frequencies(shape: ModelShape) -> Tensor:
    """[head_dim/2] radians a position, of the rotary pairs."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    plain = 1.0 / shape.rope_theta**exponent
    if (scaling := shape.rope_scaling) is None:
        return plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * plain / scaling.factor + kept * plain


def targets_of(sequences: Sequences) -> Tensor:
    """[sequences, seq]: the next token, or -100 where it belongs to another document."""
    targets = sequences.tokens[:, 1:].clone()
    crossing = sequences.documents[:, 1:] != sequences.documents[:, :-1]
    targets[:, :-1][crossing] = -100
    return targets


@dataclass(frozen=True, slots=True)
class Share:
    """Which tokens of each sequence a context parallel rank computes: a chunk of the head, one of the tail.

    Of 2 x size equal chunks rank r has r and its mirror image, so that causal attention, which grows along
    the sequence, is the same work on every rank (arXiv 2407.21783, section 3.3.2).
    """

    size: int = 1
    rank: int = 0

    def chunks(self, seq: int) -> list[range]:
        """In the sequence; one, the whole, where the rank is alone."""
        if self.size == 1:
            return [range(seq)]
        length = seq // (2 * self.size)
        return [range(k * length, (k + 1) * length) for k in (self.rank, 2 * self.size - 1 - self.rank)]

    def tokens(self, sequences: int, seq: int) -> Tensor:
        """Indices into the tokens of all sequences end to end, in the order in which the rank has them."""
        mine = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in self.chunks(seq)])
        return (torch.arange(sequences).unsqueeze(1) * seq + mine).reshape(-1)

    def order(self, sequences: int, seq: int) -> Tensor:
        """Where each token of the whole is, when the tokens of all ranks lie end to end."""
        every = [Share(self.size, rank).tokens(sequences, seq) for rank in range(self.size)]
        return torch.cat(every).argsort()


ALL = Share()


def micro_batches(
    sequences: Sequences,
    targets: Tensor,
    *,
    size: int,
    scale: float,
    rotation: Rotation,
    dtype: torch.dtype,
    share: Share = ALL,
) -> list[MicroBatch]:
    """Consecutive groups of `size` sequences, on the device of the rotation tables."""
    device = rotation.cos.device
    seq = targets.shape[1]
    parts = []
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        documents = sequences.documents[rows]
        count = len(documents)
        mine = share.tokens(count, seq)
        cos, sin = rotation.at(sequences.positions[rows].reshape(-1)[mine].to(device))
        spans = spans_of(documents)
        parts.append(
            MicroBatch(
                tokens=sequences.tokens[rows, :-1].reshape(-1)[mine].to(device),
                targets=targets[rows].reshape(-1)[mine].to(device),
                scale=scale,
                cos=cos.to(dtype),
                sin=sin.to(dtype),
                spans=spans,
                order=share.order(count, seq).to(device) if share.size > 1 else None,
                windows=windows_of(spans, share.chunks(seq), count, seq) if share.size > 1 else (),
                mask=_block_mask(documents, mine, device) if device.type == "cuda" else None,
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


def windows_of(spans: Sequence[int], chunks: Sequence[range], sequences: int, seq: int) -> tuple[Window, ...]:
    """For each run of queries of one chunk and one document: how many, and the keys that the last one sees.

    Keys are counted over all tokens of the micro-batch: from the document's start to the last query.
    """
    found = []
    edges = [0, *itertools.accumulate(spans)]
    for sequence in range(sequences):
        for chunk in chunks:
            first, stop = sequence * seq + chunk.start, sequence * seq + chunk.stop
            for begin, end in itertools.pairwise(edges):
                if (last := min(end, stop)) > max(begin, first):
                    found.append((last - max(begin, first), begin, last))
    return tuple(found)


def cut_window(window: Window, most: int) -> list[Window]:
    """As windows of at most `most` pairs of queries and keys; one that needs no mask is left as it is."""
    count, begin, end = window
    if count == end - begin:
        return [window]
    size = max(1, most // (end - begin))
    stops = [*range(size, count, size), count]
    return [(b - a, begin, end - count + b) for a, b in zip([0, *stops], stops, strict=False)]


def _block_mask(documents: Tensor, mine: Tensor, device: torch.device) -> Any:
    """Causal within runs of equal documents, for flex_attention of this rank's tokens over all tokens."""
    from torch.nn.attention.flex_attention import create_block_mask

    starts = torch.ones_like(documents, dtype=torch.int32)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    run, at = starts.reshape(-1).cumsum(0).to(device), mine.to(device)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (at[query] >= key) & (run[at[query]] == run[key])

    return create_block_mask(visible, None, None, len(at), len(run), device=str(device))
