"""How one epoch's documents become sequences: pure arithmetic, no text in sight.

Documents are put in an order that (seed, epoch) decides, each framed by bos and eos, end to end in one stream
of tokens. The stream is cut every `seq` tokens; a sequence takes one token more, which only serves as the
last target, so every token but the epoch's first is predicted once. Sequences are then shuffled as well:
neighbours in the stream are often parts of one long document. What is left at the end is dropped; it is
different text in each epoch.

Where the length of sequences changes in the course of a job, a stage goes on in the stream where the one
before it ends. So a stage that ends takes a part of an epoch's stream of its own, shuffled within itself:

    epoch 0   | stage 1: 3 sequences | stage 2: longer ones ...      | dropped
    epoch 1   | stage 2 ...

and still every token of an epoch is predicted once at most. What a stage takes does depend on where it ends.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens [start, stop) of one document."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one stage takes of an epoch's stream: `count` sequences from token `start` on."""

    epoch: int
    start: int
    count: int
    seq: int


class Course:
    """In which part each sample of a source lies, and which sequence of it."""

    def __init__(self, tokens: int, stages: Sequence[tuple[int | None, int]]) -> None:
        """`tokens` of an epoch; samples and length of each stage, the last one without an end."""
        self._tokens = tokens
        self._begins: list[int] = []  # first sample of each stage
        self._stages: list[
            tuple[int | None, Part]
        ] = []  # samples, and where it begins; count: that fit there
        first = epoch = start = 0
        for samples, seq in stages:
            room = sequences_per_epoch(tokens - start, seq)
            self._begins.append(first)
            self._stages.append((samples, Part(epoch=epoch, start=start, count=room, seq=seq)))
            if samples:
                part, _ = self.place(first + samples - 1)
                epoch, start = part.epoch, part.start + part.count * seq
                first += samples

    def place(self, sample: int) -> tuple[Part, int]:
        stage = bisect_right(self._begins, sample) - 1
        samples, begin = self._stages[stage]
        number = sample - self._begins[stage]
        if number < begin.count:
            return replace(begin, count=_at_most(begin.count, samples)), number
        whole = sequences_per_epoch(self._tokens, begin.seq)
        later, sequence = divmod(number - begin.count, whole)
        left = None if samples is None else samples - begin.count - later * whole
        part = Part(epoch=begin.epoch + 1 + later, start=0, count=_at_most(whole, left), seq=begin.seq)
        return part, sequence


def _at_most(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


class Epoch:
    """Which tokens each sequence of one pass over the documents consists of, or of a part of it."""

    def __init__(
        self,
        lengths: NDArray[np.int64],
        *,
        seq: int,
        seed: int,
        epoch: int,
        start: int = 0,
        count: int | None = None,
    ) -> None:
        """`lengths` counts the tokens of each document, bos and eos included."""
        self.seq, self._start = seq, start
        self.order = permutation(len(lengths), seed, epoch, 0)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[self.order])])
        count = sequences_per_epoch(int(self._starts[-1]) - start, seq) if count is None else count
        self.sequences = permutation(count, seed, epoch, 1, *([start] if start else []))

    def pieces(self, sequence: int) -> list[Piece]:
        """The parts of documents that make up seq + 1 tokens, in order."""
        position = self._start + int(self.sequences[sequence]) * self.seq
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
