"""What data and generation ask of a tokenizer, and the one that needs no files.

The default tokenizer takes bytes as tokens: it knows every language and lets a slice of a file be a slice of
its tokens.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
BYTES = "bytes"  # what the default is called where a file may stand


class Tokenizer(Protocol):
    """What packing and sampling need. Texts are UTF-8."""

    @property
    def name(self) -> str:
        """Tells two tokenizations apart: part of a corpus's digest."""
        ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def bos(self) -> int: ...

    @property
    def eos(self) -> int: ...

    @property
    def pad(self) -> int: ...

    @property
    def sliceable(self) -> bool:
        """Whether every byte is one token, so that tokens can be had of a part of a text."""
        ...

    @property
    def special(self) -> Mapping[str, int]:
        """Tokens that no text encodes to, by name."""
        ...

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end what a model says."""
        ...

    def encode(self, text: bytes) -> Tokens:
        """Tokens of a text, without bos and eos. What looks like a special token is text like any other.

        InputError for what is no UTF-8, except where any byte is a token.
        """
        ...

    def raw(self, tokens: Tokens) -> bytes:
        """The bytes of tokens; special and unknown ones are left out."""
        ...

    def decode(self, tokens: Tokens) -> str:
        """The text of tokens; what is no UTF-8 is replaced."""
        ...


class ByteTokenizer:
    """256 bytes, bos, eos, pad, and one unused entry: 260 can be cut over two and four ranks."""

    name = "bytes-1"
    vocabulary = 260
    bos, eos, pad = 256, 257, 258
    sliceable = True
    special: Mapping[str, int] = {"<bos>": 256, "<eos>": 257, "<pad>": 258}
    stops = frozenset({257})

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64)

    def raw(self, tokens: Tokens) -> bytes:
        return tokens[tokens < 256].astype(np.uint8).tobytes()

    def decode(self, tokens: Tokens) -> str:
        return self.raw(tokens).decode(errors="replace")
