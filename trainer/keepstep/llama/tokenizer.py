"""From text to tokens and back.

The default tokenizer takes bytes as tokens, so it needs no files, knows every language, and lets a slice of a
file be a slice of its tokens. Another one has to offer what `Tokenizer` names; data only asks that.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


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

    def encode(self, text: bytes) -> Tokens:
        """Tokens of a text, without bos and eos."""
        ...

    def decode(self, tokens: Tokens) -> str:
        """The text of tokens; special ones are left out, what is no UTF-8 is replaced."""
        ...


class ByteTokenizer:
    """256 bytes, bos, eos, pad, and one unused entry: 260 can be cut over two and four ranks."""

    name = "bytes-1"
    vocabulary = 260
    bos, eos, pad = 256, 257, 258
    sliceable = True

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64)

    def decode(self, tokens: Tokens) -> str:
        return tokens[tokens < 256].astype(np.uint8).tobytes().decode(errors="replace")
