"""Llama 3's tokenizer, from whichever file it came in.

    tokenizer.model   tiktoken's format: a line "base64 rank" for each entry. Special tokens are not in it;
                      they follow the last entry, 256 of them, in Llama 3.1's order.
    tokenizer.json    Hugging Face's format, with its special tokens.

tiktoken and tokenizers do the work. Both formats of one vocabulary give the same tokens: a text is cut where
Meta's own code cuts it (every 400,000 characters, and runs without or of white space after 25,000), since
tiktoken's time grows with the square of such a run.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike

from keepstep.core.errors import InputError
from keepstep.llama.tokenizer.chat import BEGIN, END, START, TURN
from keepstep.llama.tokenizer.protocol import BYTES, ByteTokenizer, Tokenizer, Tokens

TEXT_END, MESSAGE_END, PADDING = "<|end_of_text|>", "<|eom_id|>", "<|finetune_right_pad_id|>"
# How a text is cut into words before pairs are merged within each: published with the vocabulary.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FIRST_SPECIAL = (
    BEGIN, TEXT_END, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", PADDING, "<|step_id|>",
    START, END, MESSAGE_END, TURN, "<|python_tag|>", "<|image|>",
)  # fmt: skip
SPECIAL = (
    *_FIRST_SPECIAL, *(f"<|reserved_special_token_{k}|>" for k in range(2, 258 - len(_FIRST_SPECIAL)))
)  # fmt: skip
_BLOCK, _RUN = 400_000, 25_000  # characters
_RUNS = re.compile(r"\s+|\S+")


class Llama3Tokenizer:
    """Byte pairs; `pieces` has the bytes of each entry by its number, empty ones for special tokens."""

    sliceable = False

    def __init__(
        self,
        name: str,
        encode: Callable[[str], ArrayLike],
        pieces: Sequence[bytes],
        special: Mapping[str, int],
    ) -> None:
        self.name, self.vocabulary, self.special = name, len(pieces), special
        self._encode, self._pieces = encode, pieces
        self.bos, self.eos = special[BEGIN], special[TEXT_END]
        self.pad = special.get(PADDING, self.eos)
        self.stops = frozenset(special[m] for m in (TEXT_END, MESSAGE_END, TURN) if m in special)

    def encode(self, text: bytes) -> Tokens:
        try:
            whole = text.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                "the text is no UTF-8", where=f"byte {error.start:,}", why=error.reason,
                next="Convert it, or leave it out.",
            ) from error  # fmt: skip
        parts = [np.asarray(self._encode(part)).astype(np.int64) for part in cuts(whole)]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.int64)])

    def raw(self, tokens: Tokens) -> bytes:
        known = tokens[(tokens >= 0) & (tokens < self.vocabulary)]
        return b"".join([self._pieces[token] for token in known.tolist()])

    def decode(self, tokens: Tokens) -> str:
        return self.raw(tokens).decode(errors="replace")


def open_tokenizer(name: str | Path | None) -> Tokenizer:
    """By the path of its file, or of the folder that holds it; None or "bytes": the default.

    InputError if there is none, if it is damaged or of another kind, or if its library is not installed.
    """
    if name is None or name == BYTES:
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        within = [path / file for file in ("tokenizer.model", "original/tokenizer.model", "tokenizer.json")]
        path = next((file for file in within if file.is_file()), path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            "there is no tokenizer", where=str(path), why=error.strerror or str(error),
            next=f"Name a tokenizer.model or tokenizer.json that every node has, or {BYTES!r}.",
        ) from error  # fmt: skip
    name = f"llama3-{xxhash.xxh3_128(content).hexdigest()}"
    if content.lstrip()[:1] == b"{":
        return _of_hugging_face(name, content, path)
    return _of_tiktoken(name, content, path)


def cuts(text: str) -> Iterator[str]:
    """The parts of a text that are encoded each on its own."""
    for start in range(0, len(text), _BLOCK):
        block = text[start : start + _BLOCK]
        if not _has_long_run(block):
            yield block
            continue
        begin = 0
        for run in _RUNS.finditer(block):
            for cut in range(run.start() + _RUN, run.end(), _RUN):
                yield block[begin:cut]
                begin = cut
        yield block[begin:]


def _has_long_run(block: str) -> bool:
    """Whether there is more than _RUN of one kind in a row: then it covers a multiple of _RUN."""
    for at in range(_RUN, len(block), _RUN):
        kind = block[at].isspace()
        before = at
        while before and block[before - 1].isspace() == kind and at - before <= _RUN:
            before -= 1
        after = at
        while after < len(block) and block[after].isspace() == kind and after - before <= _RUN:
            after += 1
        if after - before > _RUN:
            return True
    return False


def _of_tiktoken(name: str, content: bytes, path: Path) -> Llama3Tokenizer:
    try:
        import tiktoken
    except ImportError as error:
        raise _not_installed("tiktoken", path) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines()):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            why = f"line {number + 1:,} is not an entry and its rank"
            raise _unusable(path, why) from error
        if int(rank) != number or len(ranks) != number + 1:
            raise _unusable(
                path, f"line {number + 1:,} has rank {rank.decode()} or an entry for the second time"
            )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise _unusable(path, f"{len(missing)} single bytes are missing, the first is {missing[0]:#04x}")
    special = {mark: len(ranks) + k for k, mark in enumerate(SPECIAL)}
    encoding = tiktoken.Encoding(
        name=name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens=dict(special)
    )

    def encode(text: str) -> ArrayLike:
        return encoding.encode_to_numpy(text, disallowed_special=())

    return Llama3Tokenizer(name, encode, [*ranks, *(b"" for _ in SPECIAL)], special)


def _of_hugging_face(name: str, content: bytes, path: Path) -> Llama3Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise _not_installed("tokenizers", path) from error
    try:
        document = json.loads(content)
        kind = document["model"]["type"], "ByteLevel" in json.dumps(document["decoder"])
        added: list[Mapping[str, Any]] = document["added_tokens"]
        special = {str(token["content"]): int(token["id"]) for token in added if token["special"]}
        vocabulary: Mapping[str, int] = document["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise _unusable(path, f"{type(error).__name__}: {error}") from error
    if kind != ("BPE", True):
        raise _unusable(path, f"its model is {kind[0]}, and Llama 3's is BPE over bytes")
    if missing := [mark for mark in (BEGIN, TEXT_END) if mark not in special]:
        raise _unusable(path, f"it has no special token {', '.join(missing)}")
    try:
        library = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library's own boundary: outermost, and it raises nothing narrower
        raise _unusable(path, str(error)) from error
    library.encode_special_tokens = True  # a mark in a text is text
    library.no_truncation()
    library.no_padding()
    letters = _bytes_of_letters()
    pieces = [b""] * (1 + max(library.get_vocab(with_added_tokens=True).values()))
    for entry, token in vocabulary.items():
        if entry not in special:
            if strange := set(entry) - letters.keys():
                raise _unusable(path, f"entry {token} has {strange.pop()!r}, which stands for no byte")
            pieces[token] = bytes(letters[letter] for letter in entry)

    def encode(text: str) -> ArrayLike:
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.int64)

    return Llama3Tokenizer(name, encode, pieces, special)


def _bytes_of_letters() -> Mapping[str, int]:
    """The letters that stand for bytes in byte-level vocabularies: themselves where they can be printed."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + k): byte for k, byte in enumerate(others)}


def _not_installed(library: str, path: Path) -> InputError:
    return InputError(
        "the tokenizer cannot be opened", where=str(path), why=f"{library} is not installed here",
        next="Install keepstep[tokenizer] in the environment of the ranks.",
    )  # fmt: skip


def _unusable(path: Path, why: str) -> InputError:
    return InputError(
        "no tokenizer of Llama 3", where=str(path), why=why,
        next="Name a tokenizer.model in tiktoken's format, or Hugging Face's tokenizer.json.",
    )  # fmt: skip
