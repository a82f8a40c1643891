"""Batches as a pure function of (seed, step).

Sample number `step * sequences_per_step + k` is the k-th sequence of a step, whoever asks for it: a restart
or another layout needs no state of the data but the step, and every sample is used exactly once an epoch.
The position is recorded with each checkpoint all the same, and checked against, because other text, another
seed or another batch size would break that promise without a word.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstep.core.errors import InputError
from keepstep.llama.data.documents import Documents, open_documents
from keepstep.llama.data.packing import Epoch, Piece, sequences_per_epoch
from keepstep.llama.tokenizer import ByteTokenizer, Tokenizer, Tokens


class Batch(NamedTuple):
    """Sequences of packed documents, ready for torch.from_numpy."""

    tokens: NDArray[np.int64]  # [n, seq + 1]: inputs are [:, :-1], targets [:, 1:]
    documents: NDArray[np.int32]  # [n, seq]: index of the input's document within its sequence, from 0
    positions: NDArray[np.int64]  # [n, seq]: from 0 at each document's first token in the sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far the data was used, as a checkpoint's manifest has it."""

    seed: int
    step: int
    samples: int  # sequences used so far
    seq: int
    source: str
    digest: str  # of the text and its tokenization


class Corpus:
    """All text of a job, as numbered samples."""

    def __init__(
        self, documents: Documents, tokenizer: Tokenizer, *, seed: int, seq: int, sequences_per_step: int
    ) -> None:
        self.tokenizer, self.seed, self.seq = tokenizer, seed, seq
        self.sequences_per_step = sequences_per_step
        self.source, self.digest = documents.source, f"{tokenizer.name}:{documents.digest}"
        self.skipped = documents.skipped
        self._documents = documents
        self._encoded: list[Tokens] | None = None
        if not tokenizer.sliceable:  # then lengths are only known by tokenizing; kept, as it is slow
            whole = (documents.read(k, 0, int(n)) for k, n in enumerate(documents.length))
            self._encoded = [tokenizer.encode(text) for text in whole]
        lengths = documents.length if self._encoded is None else np.array([len(t) for t in self._encoded])
        self._lengths = lengths.astype(np.int64) + 2  # bos and eos
        self.tokens = int(self._lengths.sum())  # of one epoch
        self.samples_per_epoch = sequences_per_epoch(self.tokens, seq)
        if self.samples_per_epoch == 0:
            raise InputError(
                "the text is too short",
                where=f"data.source {self.source!r}",
                why=f"it has {self.tokens:,} tokens, one sequence needs {seq + 1:,}",
                next="Name more text, or a shorter batch.seq.",
            )
        self._epochs: dict[int, Epoch] = {}

    @classmethod
    def open(
        cls,
        source: str = "stdlib",
        path: Path | str | None = None,
        *,
        seed: int,
        seq: int,
        sequences_per_step: int,
        tokenizer: Tokenizer | None = None,
    ) -> "Corpus":
        """The corpus of a job. Seq counts tokens; InputError for text that is missing or too short."""
        documents = open_documents(source, None if path is None else Path(path))
        chosen = ByteTokenizer() if tokenizer is None else tokenizer
        return cls(documents, chosen, seed=seed, seq=seq, sequences_per_step=sequences_per_step)

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        """Sequences [start, stop) of the step that follows `step` completed ones."""
        assert 0 <= start <= stop <= self.sequences_per_step, (start, stop)
        return self.samples(step * self.sequences_per_step + start, stop - start)

    def samples(self, first: int, count: int) -> Batch:
        """Consecutive samples by number; epochs follow each other without a seam."""
        batch = Batch(
            tokens=np.empty((count, self.seq + 1), np.int64),
            documents=np.empty((count, self.seq), np.int32),
            positions=np.empty((count, self.seq), np.int64),
        )
        for row in range(count):
            epoch, sequence = divmod(first + row, self.samples_per_epoch)
            self._fill(batch, row, self._epoch(epoch).pieces(sequence))
        return batch

    def position(self, step: int) -> dict[str, Any]:
        """For the manifest of the checkpoint after `step` completed steps."""
        return asdict(self._position(step))

    def check(self, recorded: Mapping[str, Any]) -> None:
        """InputError if a checkpoint's position is not where this corpus would go on."""
        expected = self.position(int(recorded.get("step", 0)))
        for name, here in expected.items():
            there = recorded.get(name)
            if there != here:
                raise InputError(
                    f"the checkpoint was made with other data: {_NOUN[name]} {there} there, {here} here",
                    where=f"data ({self.source})",
                    why="samples would be used twice or not at all",
                    next="Use the same text, seed and batch as before, or start a new job with init_from.",
                )

    def _position(self, step: int) -> Position:
        return Position(
            seed=self.seed,
            step=step,
            samples=step * self.sequences_per_step,
            seq=self.seq,
            source=self.source,
            digest=self.digest,
        )

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            if len(self._epochs) > 1:  # a step touches two at most
                del self._epochs[min(self._epochs)]
            self._epochs[number] = Epoch(self._lengths, seq=self.seq, seed=self.seed, epoch=number)
        return self._epochs[number]

    def _fill(self, batch: Batch, row: int, pieces: list[Piece]) -> None:
        at = 0
        for number, piece in enumerate(pieces):
            end = at + piece.stop - piece.start
            batch.tokens[row, at:end] = self._tokens(piece)
            inputs = min(end, self.seq)  # the last token is a target only
            batch.documents[row, at:inputs] = number
            batch.positions[row, at:inputs] = np.arange(inputs - at)
            at = end

    def _tokens(self, piece: Piece) -> Tokens:
        """Token 0 of a document is bos and the last one eos; the text's own lie between."""
        length = int(self._lengths[piece.document])
        start, stop = max(piece.start - 1, 0), min(piece.stop - 1, length - 2)
        if self._encoded is None:
            text = self._documents.read(piece.document, start, stop) if stop > start else b""
            middle = self.tokenizer.encode(text)
        else:
            middle = self._encoded[piece.document][start:stop]
        first = [self.tokenizer.bos] if piece.start == 0 else []
        last = [self.tokenizer.eos] if piece.stop == length else []
        return np.concatenate([np.array(first, np.int64), middle, np.array(last, np.int64)])


_NOUN = {
    "seed": "seed",
    "step": "step",
    "samples": "samples used",
    "seq": "sequence length",
    "source": "source",
    "digest": "digest",
}
