"""Batches as a pure function of (seed, step).

Samples are numbered through all steps: that of the k-th sequence of a step is k more than all steps before
use, whoever asks for it. A restart or another layout needs no state of the data but the step, and every
sample is used exactly once an epoch. Stages with longer sequences count on (packing.py: where these lie).
With several sources, which one a sample comes from is such a function, too (mixture.py). The position is
recorded with each checkpoint all the same, and checked against, because other text, another seed, other
weights or another batch size would break that promise without a word.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from keepstep.core.errors import InputError
from keepstep.llama.data.documents import Documents, open_documents
from keepstep.llama.data.heldout import Text, split
from keepstep.llama.data.mixture import BLOCK, Mixture, shares_of
from keepstep.llama.data.packing import Course, Epoch, Part, Piece, sequences_per_epoch
from keepstep.llama.data.shards import Manifest, TokenSource
from keepstep.llama.tokenizer import ByteTokenizer, Tokenizer, Tokens


class Batch(NamedTuple):
    """Sequences of packed documents, ready for torch.from_numpy."""

    tokens: NDArray[np.int64]  # [n, seq + 1]: inputs are [:, :-1], targets [:, 1:]
    documents: NDArray[np.int32]  # [n, seq]: index of the input's document within its sequence, from 0
    positions: NDArray[np.int64]  # [n, seq]: from 0 at each document's first token in the sequence


class TextSource:
    """Text that is tokenised here: as it is read where bytes are tokens, else all of it at once, and kept."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer) -> None:
        self.source, self.digest = documents.source, f"{tokenizer.name}:{documents.digest}"
        self.bad, self.bos, self.eos = documents.skipped, tokenizer.bos, tokenizer.eos
        self.vocabulary = tokenizer.vocabulary
        self.hashes: NDArray[np.uint64] | None = documents.hashes
        self._documents, self._tokenizer = documents, tokenizer
        self._encoded: list[Tokens] | None = None
        self.lengths = documents.length
        if not tokenizer.sliceable:  # then lengths are only known by tokenizing; kept, as it is slow
            whole = (documents.read(k, 0, int(n)) for k, n in enumerate(documents.length))
            self._encoded = [tokenizer.encode(text) for text in whole]
            self.lengths = np.array([len(tokens) for tokens in self._encoded], np.int64)

    def read(self, document: int, start: int, stop: int) -> Tokens:
        if self._encoded is not None:
            return self._encoded[document][start:stop]
        text = self._documents.read(document, start, stop) if stop > start else b""
        return self._tokenizer.encode(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How steps are cut into sequences, from a step on."""

    after_steps: int
    seq: int
    sequences: int  # of a step


class Stream:
    """One source's samples, by number; epochs follow each other without a seam."""

    def __init__(self, text: Text, *, seed: int, stages: Sequence[tuple[int | None, int]]) -> None:
        """`stages`: how many samples, of which length; the last without an end."""
        self.text, self.seed = text, seed
        self._lengths = text.lengths.astype(np.int64) + 2  # bos and eos
        self.tokens = int(self._lengths.sum())  # of one epoch
        self.samples_per_epoch = sequences_per_epoch(self.tokens, stages[0][1])
        if sequences_per_epoch(self.tokens, seq := max(seq for _, seq in stages)) == 0:
            raise InputError(
                "the text is too short",
                where=f"data.source {text.source!r}",
                why=f"it has {self.tokens:,} tokens, one sequence needs {seq + 1:,}",
                next="Name more text, or a shorter batch.seq.",
            )
        self.course = Course(self.tokens, stages)
        self._epochs: dict[Part, Epoch] = {}  # the last two, one of which is the present one

    def fill(self, batch: Batch, row: int, sample: int) -> None:
        part, sequence = self.course.place(sample)
        at = 0
        for document, piece in enumerate(self.epoch(part).pieces(sequence)):
            end = at + piece.stop - piece.start
            batch.tokens[row, at:end] = self._tokens(piece)
            inputs = min(end, part.seq)  # the last token is a target only
            batch.documents[row, at:inputs] = document
            batch.positions[row, at:inputs] = np.arange(inputs - at)
            at = end

    def epoch(self, part: Part) -> Epoch:
        if part not in self._epochs:
            if len(self._epochs) > 1:  # a step touches two at most
                del self._epochs[min(self._epochs, key=lambda old: (old.epoch, old.start))]
            self._epochs[part] = Epoch(self._lengths, seed=self.seed, **asdict(part))
        return self._epochs[part]

    def _tokens(self, piece: Piece) -> Tokens:
        """Token 0 of a document is bos and the last one eos; the text's own lie between."""
        length = int(self._lengths[piece.document])
        start, stop = max(piece.start - 1, 0), min(piece.stop - 1, length - 2)
        middle = self.text.read(piece.document, start, stop)
        first = [self.text.bos] if piece.start == 0 else []
        last = [self.text.eos] if piece.stop == length else []
        return np.concatenate([np.array(first, np.int64), middle, np.array(last, np.int64)])


class Corpus:
    """All text of a job, as numbered samples."""

    def __init__(
        self,
        texts: Sequence[Text],
        *,
        source: str,
        seed: int,
        seq: int,
        sequences_per_step: int,
        weights: Mapping[str, float] | None = None,
        held: Sequence[Text] = (),
        stages: Sequence[Cut] = (),
    ) -> None:
        """`weights` has every source by its name where there are several; alike when left out.

        `held` is no part of it: what was held out. `stages`: later ones.
        """
        self.cuts = (Cut(after_steps=0, seq=seq, sequences=sequences_per_step), *stages)
        self.held, self.weights = held, weights
        self.source, self.seed = source, seed
        self.skipped = sum(text.bad for text in texts)
        self.digest = texts[0].digest
        self.mixture: Mixture | None = None
        if len(texts) > 1:
            shares = shares_of(weights or {text.source: 1.0 for text in texts})
            self.mixture = Mixture([shares[text.source] for text in texts], seed)
            whole = xxhash.xxh3_128("\n".join(f"{text.source} {text.digest}" for text in texts).encode())
            self.digest = f"{texts[0].digest.partition(':')[0]}:{whole.hexdigest()}"
        self._begins = [self._samples(cut.after_steps) for cut in self.cuts]  # the first sample of each stage
        used = [self._by_source(samples) for samples in self._begins]
        self.streams = []
        for number, text in enumerate(texts):
            counts = [after[number] - before[number] for before, after in itertools.pairwise(used)]
            lengths = [cut.seq for cut in self.cuts]
            self.streams.append(
                Stream(text, seed=seed, stages=list(zip([*counts, None], lengths, strict=True)))
            )
        self.tokens = sum(stream.tokens for stream in self.streams)
        self.samples_per_epoch = sum(stream.samples_per_epoch for stream in self.streams)

    def cut(self, step: int) -> Cut:
        """Of the step that follows `step` completed ones."""
        return next(cut for cut in reversed(self.cuts) if cut.after_steps <= step)

    def _samples(self, step: int) -> int:
        """That `step` steps use, of all stages."""
        ends = [*(cut.after_steps for cut in self.cuts[1:]), step]
        return sum(
            cut.sequences * max(0, min(end, step) - cut.after_steps)
            for cut, end in zip(self.cuts, ends, strict=True)
        )

    def _by_source(self, samples: int) -> list[int]:
        return [samples] if self.mixture is None else self.mixture.counts(samples)

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
        weights: Mapping[str, float] | None = None,
        holdout: float = 0.0,
        stages: Sequence[Cut] = (),
    ) -> "Corpus":
        """The corpus of a job, without the share of documents to hold out.

        Seq counts tokens; InputError for text that is missing or too short.
        """
        texts: Sequence[Text]
        if source == "tokens":
            texts = _open_store(None if path is None else Path(path), tokenizer, weights)
        else:
            documents = open_documents(source, None if path is None else Path(path))
            texts = [TextSource(documents, tokenizer or ByteTokenizer())]
        held: Sequence[Text] = ()
        if holdout:
            texts, held = split(texts, holdout)
        return cls(
            texts, source=source, seed=seed, seq=seq, sequences_per_step=sequences_per_step, weights=weights,
            held=held, stages=stages,
        )  # fmt: skip

    def of_held(self) -> "Corpus":
        """What was held out, as a corpus with the same shares."""
        return Corpus(
            self.held, source=self.source, seed=self.seed, seq=max(cut.seq for cut in self.cuts),
            sequences_per_step=1, weights=self.weights,
        )  # fmt: skip

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        """Sequences [start, stop) of the step that follows `step` completed ones."""
        assert 0 <= start <= stop <= self.cut(step).sequences, (start, stop)
        return self.samples(self._samples(step) + start, stop - start)

    def samples(self, first: int, count: int) -> Batch:
        """Consecutive samples by number, all of one stage."""
        seq = self.cuts[bisect_right(self._begins, first) - 1].seq
        batch = Batch(
            tokens=np.empty((count, seq + 1), np.int64),
            documents=np.empty((count, seq), np.int32),
            positions=np.empty((count, seq), np.int64),
        )
        for row in range(count):
            source, sample = self.mixture.at(first + row) if self.mixture else (0, first + row)
            self.streams[source].fill(batch, row, sample)
        return batch

    def position(self, step: int) -> dict[str, Any]:
        """How far the data was used, for the manifest of the checkpoint after `step` completed steps.

        With several sources: of each one the samples and tokens that were used, and its share. With several
        stages: those that have begun, and where the present one ends.
        """
        samples = self._samples(step)
        position = {
            "seed": self.seed,
            "step": step,
            "samples": samples,
            "seq": self.cut(step).seq,
            "source": self.source,
        }
        if len(self.cuts) > 1:
            begun = [cut for cut in self.cuts if cut.after_steps <= step]
            position["stages"] = [[cut.after_steps, cut.seq, cut.sequences] for cut in begun]
            position["until"] = next((c.after_steps for c in self.cuts if c.after_steps > step), None)
        if self.mixture is not None:
            counts, tokens = self.mixture.counts(samples), self._tokens(samples)
            position["sources"] = {
                stream.text.source: {
                    "digest": stream.text.digest,
                    "share": share / BLOCK,
                    "samples": count,
                    "tokens": used,
                }
                for stream, count, used, share in zip(
                    self.streams, counts, tokens, self.mixture.shares.tolist(), strict=True
                )
            }
        return position | {"digest": self.digest}

    def _tokens(self, samples: int) -> list[int]:
        """Of each source, in the first samples."""
        ends = [*self._begins[1:], samples]
        tokens = [0] * len(self.streams)
        for cut, begin, end in zip(self.cuts, self._begins, ends, strict=True):
            counts = zip(
                self._by_source(min(begin, samples)), self._by_source(min(end, samples)), strict=True
            )
            tokens = [
                t + cut.seq * (after - before) for t, (before, after) in zip(tokens, counts, strict=True)
            ]
        return tokens

    def check_vocabulary(self, model: int) -> None:
        """InputError if a model with so many entries has none for some token."""
        if (needed := max(stream.text.vocabulary for stream in self.streams)) > model:
            raise InputError(
                "the model's vocabulary is too small", where="model.vocabulary",
                why=f"it has {model:,} entries, the tokenizer {needed:,}",
                next="Raise it to a multiple of the tensor parallel degree that is at least as many.",
            )  # fmt: skip

    def check(self, recorded: Mapping[str, Any]) -> None:
        """InputError if a checkpoint's position is not where this corpus would go on."""
        expected = self.position(int(recorded.get("step", 0)))
        for name, there, here in _pairs(recorded, expected):
            if there != here:
                raise InputError(
                    f"the checkpoint was made with other data: {name} {there} there, {here} here",
                    where=f"data ({self.source})",
                    why="samples would be used twice or not at all",
                    next="Use text, seed, weights and batch of before, or begin a new job with init_from.",
                )


def _open_store(
    path: Path | None, tokenizer: Tokenizer | None, weights: Mapping[str, float] | None
) -> list[TokenSource]:
    if path is None:
        raise InputError(
            'source "tokens" needs a path',
            where="data.path",
            next="Name a folder of `keepstep data tokenize`.",
        )
    manifest = Manifest.read(path)
    if tokenizer is not None and tokenizer.name != manifest.tokenizer:
        raise InputError(
            "the tokens were made with another tokenizer", where=str(path),
            why=f"{manifest.tokenizer} there, {tokenizer.name} here", next="Name the same one, or none.",
        )  # fmt: skip
    names = list(weights or manifest.sources)
    if unknown := [name for name in names if name not in manifest.sources]:
        raise InputError(
            f"there is no source {', '.join(unknown)}", where="data.weights",
            why=f"{path} has {', '.join(manifest.sources)}", next="Give weights to sources that are there.",
        )  # fmt: skip
    return [TokenSource(path, manifest, name) for name in sorted(names)]


def _pairs(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Everything that is compared, by its name; what a source is made of comes before the whole."""
    for key in dict.fromkeys(key for key in (*here, *there) if key not in {"sources", "digest"}):
        yield _NOUN.get(key, key), there.get(key), here.get(key)
    theirs, ours = there.get("sources") or {}, here.get("sources") or {}
    yield "sources", sorted(theirs), sorted(ours)
    for name, own in ours.items():
        for key, value in own.items():
            yield f"source {name} {_NOUN.get(key, key)}", theirs[name].get(key), value
    yield "digest", there.get("digest"), here["digest"]


_NOUN = {
    "samples": "samples used", "seq": "sequence length", "tokens": "tokens used",
    "until": "end of the present stage",
}  # fmt: skip
