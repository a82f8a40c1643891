"""Tokens on disk: shards that are mapped into memory, and checked where they are touched.

    shard-00000.tokens   tokens, without bos and eos, uint16 or uint32   checked by the mebibyte, when touched
                         length of each document, int64          } the tail, checked when opened: its
                         xxh3 of each mebibyte of tokens, uint64 } digest stands in the manifest
                         xxh3 of each document's tokens, uint64  }
    shard-00000.json     what it holds and was made from: there from the moment that the shard is complete
    manifest.json        all shards of all sources: there from the moment that all are complete

So ranks that each read a little of a shard read little more to know that it is what was written.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from keepstep.core import durable
from keepstep.core.errors import InputError, KeepstepError
from keepstep.llama.tokenizer import Tokens

MANIFEST, FORMAT = "manifest.json", 2  # 1 had no hashes of documents
_BLOCK = 1 << 20  # bytes of tokens with a checksum of their own


class CorruptShard(KeepstepError):
    """Tokens that are not those that were written."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            "the shard is damaged", where=str(path), why=why,
            next="Delete it, and run the same `keepstep data tokenize` again: it writes what is missing.",
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file, as manifest and sidecar have it."""

    file: str  # relative to the store
    documents: int
    tokens: int
    text_bytes: int  # of the documents
    tail: str  # digest of lengths and checksums
    made_from: Mapping[str, Any]  # the unit of input
    bad: Mapping[str, int] = field(default_factory=dict)  # records that were left out, by reason
    named: Sequence[str] = ()  # the first of them
    hashed: bool = False  # whether the tail has hashes of documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    tokenizer: str
    vocabulary: int
    bos: int
    eos: int
    sources: Mapping[str, Sequence[Shard]]

    @property
    def dtype(self) -> np.dtype[Any]:
        return dtype_of(self.vocabulary)

    def write(self, folder: Path) -> None:
        durable.write_json(folder / MANIFEST, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """InputError if there is none, or one of a newer version or no sense."""
        path = folder / MANIFEST
        try:
            value = json.loads(path.read_bytes())
            if value.pop("format") > FORMAT:
                raise ValueError("it was written by a newer keepstep")
            sources = {
                name: tuple(Shard(**shard) for shard in shards)
                for name, shards in value.pop("sources").items()
            }
            return cls(**value, sources=sources)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                "there are no tokens", where=str(path), why=getattr(error, "strerror", None) or str(error),
                next="Make them with `keepstep data tokenize`; it writes this file when all are complete.",
            ) from error  # fmt: skip


def dtype_of(vocabulary: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


def write_shard(path: Path, texts: Sequence[Tokens], dtype: np.dtype[Any]) -> str:
    """Write a shard whole; gives the digest of its tail."""
    tokens = np.concatenate([*texts, np.empty(0, np.int64)]).astype(dtype).tobytes()
    lengths = np.array([len(text) for text in texts], "<i8")
    hashes = np.array([xxhash.xxh3_64_intdigest(text.astype(dtype).data) for text in texts], "<u8")
    tail = lengths.tobytes() + _checksums(memoryview(tokens)).tobytes() + hashes.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, tokens + tail)
    return xxhash.xxh3_64_hexdigest(tail)


def _checksums(tokens: memoryview) -> NDArray[np.uint64]:
    blocks = range(0, len(tokens), _BLOCK)
    return np.array([xxhash.xxh3_64_intdigest(tokens[k : k + _BLOCK]) for k in blocks], "<u8")


class OpenShard:
    """A shard, mapped. InputError if it is not there, CorruptShard if it is not what was written."""

    def __init__(self, path: Path, shard: Shard, dtype: np.dtype[Any], vocabulary: int) -> None:
        self.path, self._vocabulary = path, vocabulary
        size = shard.tokens * dtype.itemsize
        blocks = -(-size // _BLOCK)
        hashed = shard.documents if shard.hashed else 0
        expected = size + 8 * (shard.documents + blocks + hashed)
        try:
            with path.open("rb", buffering=0) as file:
                actual = os.fstat(file.fileno()).st_size
                if actual != expected:
                    raise CorruptShard(path, f"it has {actual:,} bytes instead of {expected:,}")
                file.seek(size)
                tail = file.read(expected - size)
        except OSError as error:
            raise InputError(
                "a shard cannot be read", where=str(path), why=error.strerror or str(error),
                next="Every node of the job needs all shards under the same path.",
            ) from error  # fmt: skip
        if xxhash.xxh3_64_hexdigest(tail) != shard.tail:
            raise CorruptShard(path, "its table of lengths and checksums is not the one that was written")
        self.lengths = np.frombuffer(tail, "<i8", shard.documents)
        self._sums = np.frombuffer(tail, "<u8", blocks, offset=8 * shard.documents)
        self.hashes = np.frombuffer(tail, "<u8", hashed, offset=8 * (shard.documents + blocks))
        self._checked = np.zeros(blocks, bool)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])
        self._tokens: NDArray[Any] = (
            np.memmap(path, dtype, "r", shape=(shard.tokens,)) if size else np.empty(0, dtype)
        )

    def read(self, document: int, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of a document."""
        begin = int(self._starts[document])
        first, last = begin + start, begin + stop
        self._check(first, last)
        return self._tokens[first:last].astype(np.int64)

    def verify(self) -> None:
        self._check(0, len(self._tokens))

    def _check(self, first: int, last: int) -> None:
        size = self._tokens.itemsize
        for block in range(first * size // _BLOCK, -(-last * size // _BLOCK)):
            if self._checked[block]:
                continue
            part = self._tokens[block * _BLOCK // size : (block + 1) * _BLOCK // size]
            if xxhash.xxh3_64_intdigest(part.data) != self._sums[block]:
                raise CorruptShard(
                    self.path, f"the tokens of mebibyte {block} are not those that were written"
                )
            if part.max() >= self._vocabulary:
                raise CorruptShard(self.path, f"token {part.max()} is past the vocabulary")
            self._checked[block] = True


class TokenSource:
    """The documents of one source of a store, by number."""

    def __init__(self, folder: Path, manifest: Manifest, name: str) -> None:
        shards = manifest.sources[name]
        self.source = name
        self.bad = sum(sum(shard.bad.values()) for shard in shards)
        self._shards = [
            OpenShard(folder / shard.file, shard, manifest.dtype, manifest.vocabulary) for shard in shards
        ]
        self.lengths = np.concatenate([np.empty(0, np.int64), *(shard.lengths for shard in self._shards)])
        hashes = np.concatenate([np.empty(0, np.uint64), *(shard.hashes for shard in self._shards)])
        self.hashes = hashes if len(hashes) == len(self.lengths) else None
        self._first = np.cumsum([0, *(shard.documents for shard in shards)])
        whole = xxhash.xxh3_128()
        for shard in shards:
            whole.update(f"{shard.documents} {shard.tokens} {shard.tail}\n".encode())
        self.digest = f"{manifest.tokenizer}:{whole.hexdigest()}"
        self.bos, self.eos, self.vocabulary = manifest.bos, manifest.eos, manifest.vocabulary

    def read(self, document: int, start: int, stop: int) -> Tokens:
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        return self._shards[shard].read(document - int(self._first[shard]), start, stop)


def verify(folder: Path) -> Iterator[KeepstepError]:
    """What is wrong with a store's shards; all of them are read."""
    manifest = Manifest.read(folder)
    for shards in manifest.sources.values():
        for shard in shards:
            try:
                OpenShard(folder / shard.file, shard, manifest.dtype, manifest.vocabulary).verify()
            except KeepstepError as error:
                yield error
