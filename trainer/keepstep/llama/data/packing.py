"""How one epoch's documents become sequences: pure arithmetic, no text in sight.

Documents are put in an order that (seed, epoch) decides, each framed by bos and eos, end to end in one stream
of tokens. The stream is cut every `seq` tokens; a sequence takes one token more, which only serves as the
last target, so every token but the epoch's first is predicted once. Sequences are then shuffled as well:
neighbours in the stream are often parts of one long document. What is left at the end is dropped; it is
different text in each epoch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens [start, stop) of one document."""

    document: int
    start: int
    stop: int


class Epoch:
    """Which tokens each sequence of one pass over the documents consists of."""

    def __init__(self, lengths: NDArray[np.int64], *, seq: int, seed: int, epoch: int) -> None:
        """`lengths` counts the tokens of each document, bos and eos included."""
        self.seq = seq
        self.order = permutation(len(lengths), seed, epoch, 0)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[self.order])])
        self.sequences = permutation(sequences_per_epoch(int(self._starts[-1]), seq), seed, epoch, 1)

    def pieces(self, sequence: int) -> list[Piece]:
        """The parts of documents that make up seq + 1 tokens, in order."""
        position = int(self.sequences[sequence]) * self.seq
        end = position + self.seq + 1
        place = int(np.searchsorted(self._starts, position, side="right")) - 1
        found = []
        while position < end:
            start, stop = int(self._starts[place]), int(self._starts[place + 1])
            taken = min(stop, end)
            found.append(
                Piece(document=int(self.order[place]), start=position - start, stop=taken - start),
            )
            position, place = taken, place + 1
        return found


def sequences_per_epoch(tokens: int, seq: int) -> int:
    return max(0, tokens - 1) // seq


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """An order of range(count) that depends on nothing but the key: on no library's generator."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mixed(state ^ np.uint64(part & _WORD))
    # Equal marks would need 2^32 documents to be likely; a stable sort makes even them harmless.
    numbers: NDArray[np.uint64] = np.arange(count, dtype=np.uint64)
    return np.argsort(_mixed(np.add(state, numbers, dtype=np.uint64)), kind="stable")


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words whose output passes for chance."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
