"""Which documents are held out: a share of them, each by the hash of its own content alone.

So neither restart, layout, seed nor what other documents there are changes on which side one is, its copies
are on the same, and a larger share holds out those of a smaller one and more.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from keepstep.core.errors import InputError
from keepstep.llama.tokenizer import Tokens


class Text(Protocol):
    """Documents as tokens; `digest` is of the text and its tokenization."""

    source: str
    digest: str
    lengths: NDArray[np.int64]  # tokens of each document, without bos and eos
    hashes: NDArray[np.uint64] | None  # of each document's content; None: nobody kept them
    bad: int  # records that were left out
    bos: int
    eos: int
    vocabulary: int

    def read(self, document: int, start: int, stop: int) -> Tokens: ...


class Part:
    """Some documents of a text, as a text of its own."""

    def __init__(self, text: Text, documents: NDArray[np.int64], what: str) -> None:
        self.source, self.digest, self.bad = text.source, f"{text.digest} {what}", text.bad
        self.bos, self.eos, self.vocabulary = text.bos, text.eos, text.vocabulary
        self.lengths = text.lengths[documents]
        self.hashes = None if text.hashes is None else text.hashes[documents]
        self._text, self._documents = text, documents

    def read(self, document: int, start: int, stop: int) -> Tokens:
        return self._text.read(int(self._documents[document]), start, stop)


def split(texts: Sequence[Text], share: float) -> tuple[list[Text], list[Text]]:
    """What is trained on, and what is held out. InputError where a source has nothing for one of them."""
    trained: list[Text] = []
    held: list[Text] = []
    for text in texts:
        if text.hashes is None:
            raise InputError(
                f"nothing can be held out of {text.source}", where="data.holdout",
                why="it was tokenised by an older keepstep, which kept no hashes of documents",
                next="Tokenise it again, or name other text under evaluation.data.",
            )  # fmt: skip
        out = text.hashes < np.uint64(min(share, 0.5) * 2.0**64)
        for chosen, what, to in ((~out, "all but", trained), (out, "only", held)):
            if not chosen.any():
                raise InputError(
                    f"{share:g} of source {text.source!r} is {'all' if to is trained else 'nothing'}",
                    where="data.holdout", why=f"it has {len(out):,} documents, which are held out whole",
                    next="Change the share, or name other text under evaluation.data.",
                )  # fmt: skip
            to.append(Part(text, np.flatnonzero(chosen), f"{what} {share:g}"))
    return trained, held
