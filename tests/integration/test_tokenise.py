"""Text into shards and out again: every record once, whatever its file, and whatever is killed in between."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import vocabularies
from keepstep.core.errors import InputError, KeepstepError, Refused
from keepstep.llama.data import Corpus
from keepstep.llama.data.records import records, units
from keepstep.llama.data.shards import CorruptShard, Manifest, TokenSource, verify
from keepstep.llama.data.tokenise import _locked, tokenise
from keepstep.llama.tokenizer import ByteTokenizer, open_tokenizer

BYTES = ByteTokenizer()


def texts_of(folder: Path, name: str) -> list[str]:
    source = TokenSource(folder, Manifest.read(folder), name)
    return [BYTES.decode(source.read(k, 0, int(n))) for k, n in enumerate(source.lengths)]


@pytest.fixture
def words() -> list[str]:
    chance = random.Random(7)
    return [f"{k} " + chance.choice(["é", "word ", "中文"]) * chance.randrange(400) for k in range(300)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": k, "text": text}) + "\n" for k, text in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": list(range(len(texts))), "text": texts})
    pq.write_table(table, path, row_group_size=37)
    return path


def write_texts(path: Path, texts: list[str]) -> Path:
    path.mkdir()
    for k, text in enumerate(texts):
        (path / f"{k:04d}.txt").write_text(text)
    return path


WRITERS: dict[str, Callable[[Path, list[str]], Path]] = {
    "a.jsonl": write_lines, "a.parquet": write_parquet, "texts": write_texts
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.parametrize("unit_bytes", [1, 1000, 20_000, 1 << 30])
def test_units_cover_every_record_once(tmp_path: Path, words: list[str], name: str, unit_bytes: int) -> None:
    path = WRITERS[name](tmp_path / name, words[:60] if unit_bytes == 1 else words)
    cut = list(units("s", path, max(unit_bytes, 7)))
    assert len(cut) == 1 or unit_bytes < 1 << 30
    found = [record for unit in cut for record in records(unit, "text")]
    assert [record.text.decode() for record in found] == (words[:60] if unit_bytes == 1 else words)
    assert not any(record.bad for record in found) and len({record.where for record in found}) == len(found)


@pytest.mark.slow  # the library that writes them is large
def test_a_dataset_of_hugging_face_on_disk(tmp_path: Path, words: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"id": list(range(300)), "text": words})
    shuffled = dataset.shuffle(seed=1).select(range(250))
    shuffled.save_to_disk(tmp_path / "one", num_shards=3)
    for unit_bytes in (5_000, 1 << 30):
        found = [r for unit in units("s", tmp_path / "one", unit_bytes) for r in records(unit, "text")]
        assert [record.text.decode() for record in found] == shuffled["text"][:]
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match="several splits"):
        list(units("s", tmp_path / "two", 1000))
    (unit, *_) = units("s", tmp_path / "two" / "train", 1 << 30)
    with pytest.raises(InputError, match="has no column 'content': it has id, text"):
        list(records(unit, "content"))


def test_bad_records_are_counted_and_named_by_their_place(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    rows = [
        b'{"text": "good"}', b"", b"{torn", b'{"other": 1}', b'{"text": 7}', b'{"text": ""}', b"[1]",
        b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[" * 100_000, b'{"text": "also good"}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(rows))
    manifest = tokenise(tmp_path / "out", {"web": path}, tokenizer="bytes")
    (shard,) = manifest.sources["web"]
    assert texts_of(tmp_path / "out", "web") == ["good", "also good"]
    assert shard.bad == {"no JSON": 2, "no field text": 2, "no text": 1, "empty": 1, "no UTF-8": 2}
    assert shard.named[0] == f"{path}:byte 18: no JSON" and len(shard.named) == 8
    corpus = Corpus.open("tokens", tmp_path / "out", seed=0, seq=4, sequences_per_step=1)
    assert corpus.skipped == 8


def test_files_that_are_damaged_are_named(tmp_path: Path, words: list[str]) -> None:
    path = write_parquet(tmp_path / "a.parquet", words)
    (unit,) = units("s", path, 1 << 30)
    with pytest.raises(InputError, match="has no column 'content': it has id, text"):
        list(records(unit, "content"))
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: the file was changed while it was read"):
        list(records(unit, "text"))
    with pytest.raises(InputError, match=r"a\.parquet: the file is damaged"):
        tokenise(tmp_path / "out", {"web": path}, tokenizer="bytes")
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"a\.parquet: the file is damaged"):
        list(units("s", path, 1 << 30))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(what: Callable[[], bool], deadline_s: float = 120) -> None:
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < deadline_s, "it did not happen"
        os.sched_yield()


def test_killed_at_any_point_it_goes_on_to_the_same_bytes(tmp_path: Path, words: list[str]) -> None:
    """The parent is killed once and its workers end with it; then a worker, and the run says so."""
    sources = {
        "web": write_lines(tmp_path / "a.jsonl", words * 8),
        "books": write_texts(tmp_path / "t", words),
    }
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    tokenise(undisturbed, sources, tokenizer="bytes", workers=2, unit_bytes=40_000)
    command = [
        sys.executable,
        "-m",
        "keepstep.llama.data",
        "tokenize",
        str(out),
        "--shard-mb",
        str(40_000 / (1 << 20)),
    ]
    command += [word for name, path in sources.items() for word in ("--source", f"{name}={path}")]

    def shards() -> int:
        return len(list(out.glob("*/*.json")))

    def more_than(count: int) -> bool:
        return shards() > count

    def all_ended(processes: list[int]) -> bool:
        return all(ended(process) for process in processes)

    for kill_worker in (False, True):
        before = shards()
        process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True)
        with process:
            until(partial(more_than, before))
            workers = children_of(process.pid)
            assert workers and not (out / "manifest.json").exists()
            os.kill(workers[0] if kill_worker else process.pid, signal.SIGKILL)
            told = process.communicate(timeout=120)[1]
        until(partial(all_ended, workers))
        if kill_worker and not (out / "manifest.json").exists():
            assert process.returncode == 1 and "exit code -9" in told
        kept = {name: content for name, content in contents(out).items() if name.endswith(".tokens")}
        done = [f"{path.parent.name}/{path.stem}.tokens" for path in out.glob("*/*.json")]
        whole = contents(undisturbed)
        assert done and all(kept[name] == whole[name] for name in done)
    tokenise(out, sources, tokenizer="bytes", workers=1, unit_bytes=40_000)
    assert contents(out) == contents(undisturbed)
    assert texts_of(out, "web") == words * 8 and texts_of(out, "books") == words


def test_a_store_that_was_begun_with_other_input_is_refused(tmp_path: Path, words: list[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", words)
    out = tmp_path / "out"
    tokenise(out, {"web": path}, tokenizer="bytes")
    made: list[object] = []
    tokenise(out, {"web": path}, tokenizer="bytes", tell=lambda *told: made.append(told))
    assert made == []
    with pytest.raises(InputError, match="field text then, body now"):
        tokenise(out, {"web": path}, tokenizer="bytes", field="body")
    with path.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(InputError, match=rf"1 files were changed.*{path}"):
        tokenise(out, {"web": path}, tokenizer="bytes")
    with _locked(out), pytest.raises(Refused, match="another process tokenises"):
        tokenise(out, {"web": path}, tokenizer="bytes")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="is not empty"):
        tokenise(tmp_path / "mine", {"web": path}, tokenizer="bytes")


@pytest.fixture
def store(tmp_path: Path, words: list[str]) -> Path:
    sources = {
        "web": write_lines(tmp_path / "a.jsonl", words * 10),
        "books": write_texts(tmp_path / "b", words),
    }
    tokenise(tmp_path / "store", sources, tokenizer="bytes", unit_bytes=1 << 20)
    return tmp_path / "store"


def corpus(store: Path, **changed: Any) -> Corpus:
    settings = {"seed": 3, "seq": 32, "sequences_per_step": 8, "weights": {"web": 3, "books": 1}}
    return Corpus.open("tokens", store, **{**settings, **changed})


def test_documents_of_a_store_are_held_out_by_their_content(store: Path) -> None:
    held = corpus(store, holdout=0.5).held
    assert {text.source for text in held} == {"web", "books"}
    for text in held:
        assert text.hashes is not None and 0 < len(text.hashes) == len(text.lengths)
        hashes = [
            xxhash.xxh3_64_intdigest(text.read(k, 0, int(n)).astype("<u2").data)
            for k, n in enumerate(text.lengths)
        ]
        assert hashes == text.hashes.tolist() and max(hashes) < 1 << 63


def test_a_store_without_hashes_is_read_but_nothing_is_held_out(store: Path) -> None:
    """One that an older version made: its shards' tails are shorter."""
    manifest = Manifest.read(store)
    for name, of in manifest.sources.items():
        whole = TokenSource(store, manifest, name)
        older = []
        for shard in of:
            path = store / shard.file
            path.write_bytes(path.read_bytes()[: -8 * shard.documents])
            blocks = -(-shard.tokens * manifest.dtype.itemsize >> 20)
            tail = path.read_bytes()[-8 * (shard.documents + blocks) :]
            older.append(replace(shard, hashed=False, tail=xxhash.xxh3_64_hexdigest(tail)))
        manifest = replace(manifest, sources={**manifest.sources, name: tuple(older)})
        manifest.write(store)
        again = TokenSource(store, Manifest.read(store), name)
        assert again.read(0, 0, 9).tolist() == whole.read(0, 0, 9).tolist()
    with pytest.raises(InputError, match="kept no hashes"):
        corpus(store, holdout=0.5)


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_a_corrupt_shard_is_named_when_it_is_touched_and_can_be_made_again(store: Path) -> None:
    path = store / "web" / "shard-00000.tokens"
    good = path.read_bytes()
    assert list(verify(store)) == [] and len(good) > (1 << 20) + 50_000
    flipped(path, (1 << 20) + 77)
    whole = TokenSource(store, Manifest.read(store), "web")
    whole.read(0, 0, 10)  # of the first mebibyte, which is whole
    with pytest.raises(CorruptShard, match=r"web/shard-00000\.tokens.*mebibyte 1 "):
        for document, length in enumerate(whole.lengths):
            whole.read(document, 0, int(length))
    assert [str(path) in str(error) for error in verify(store)] == [True]
    path.write_bytes(good)
    flipped(path, len(good) - 3)
    with pytest.raises(CorruptShard, match="table of lengths"):
        corpus(store)
    path.write_bytes(good[:-9])
    with pytest.raises(CorruptShard, match="bytes instead of"):
        corpus(store)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        corpus(store)
    sources = {"web": store.parent / "a.jsonl", "books": store.parent / "b"}
    tokenise(store, sources, tokenizer="bytes", unit_bytes=1 << 20)
    assert path.read_bytes() == good


def test_samples_come_in_proportion_and_are_accounted_exactly(store: Path) -> None:
    """Against a count of what was read: the letters tell the source that each sequence came from."""
    chosen = corpus(store)
    books = sum(chosen.mixture.at(n)[0] == 0 for n in range(8 * 700)) if chosen.mixture else 0
    recorded = chosen.position(700)["sources"]
    assert recorded["books"]["samples"] == books and recorded["books"]["tokens"] == 32 * books
    assert recorded["web"]["samples"] == 8 * 700 - books
    assert (recorded["books"]["share"], recorded["web"]["share"]) == (0.25, 0.75)
    assert abs(books / 5600 - 0.25) < 0.02
    seen: dict[int, list[int]] = {0: [], 1: []}
    assert chosen.mixture is not None
    for sample in range(9000):
        source, number = chosen.mixture.at(sample)
        assert number == len(seen[source])
        seen[source].append(number)
        assert sample % 997 or chosen.mixture.counts(sample + 1) == [len(seen[0]), len(seen[1])]


def test_a_restart_in_the_middle_reads_what_would_have_come(store: Path) -> None:
    whole = corpus(store).samples(0, 8 * 40)
    for step in (0, 7, 39):
        again = corpus(store).sequences(step, 2, 6)
        assert np.array_equal(again.tokens, whole.tokens[8 * step + 2 : 8 * step + 6])
        assert np.array_equal(again.positions, whole.positions[8 * step + 2 : 8 * step + 6])
    other = corpus(store, seed=4).samples(0, 8)
    assert not np.array_equal(other.tokens, whole.tokens[:8])


def test_going_on_with_other_data_is_refused_with_the_source(store: Path, words: list[str]) -> None:
    recorded = json.loads(json.dumps(corpus(store).position(50)))
    corpus(store).check(recorded)
    for changed, message in (
        ({"weights": {"web": 1, "books": 1}}, "source books share 0.25 there, 0.5 here"),
        ({"seed": 4}, "seed 3 there, 4 here"),
        ({"weights": {"web": 1}}, r"sources \['books', 'web'\] there, \[\] here"),
    ):
        with pytest.raises(InputError, match=message):
            corpus(store, **changed).check(recorded)
    sources = {"web": write_lines(store.parent / "a.jsonl", words * 9), "books": store.parent / "b"}
    tokenise(store.parent / "other", sources, tokenizer="bytes", unit_bytes=1 << 20)
    with pytest.raises(InputError, match=r"source web digest bytes-1:\w+ there"):
        corpus(store.parent / "other").check(recorded)


def test_stores_that_cannot_be_used(store: Path, tmp_path: Path) -> None:
    model = vocabularies.write_tiktoken({bytes([k]): k for k in range(256)}, tmp_path / "tokenizer.model")
    for call, message in (
        (lambda: Corpus.open("tokens", None, seed=0, seq=4, sequences_per_step=1), "needs a path"),
        (lambda: corpus(tmp_path), "there are no tokens"),
        (lambda: corpus(store, weights={"wab": 1}), "no source wab.*has web, books"),
        (lambda: corpus(store, weights={"web": 0, "books": 1}), "weight of web cannot"),
        (lambda: corpus(store, tokenizer=open_tokenizer(model)), "made with another tokenizer"),
        (lambda: tokenise(tmp_path / "o", {"a/b": tmp_path}, tokenizer="bytes"), "'a/b' is no name"),
        (lambda: tokenise(tmp_path / "o", {"a": tmp_path / "no"}, tokenizer="bytes"), "no such file"),
    ):
        with pytest.raises(KeepstepError, match=message):
            call()


def test_byte_pairs_in_shards_are_what_the_tokenizer_gives(tmp_path: Path, words: list[str]) -> None:
    model = vocabularies.write_tiktoken(
        vocabularies.trained(600, vocabularies.SCRIPTS), tmp_path / "tokenizer.model"
    )
    manifest = tokenise(
        tmp_path / "out", {"web": write_parquet(tmp_path / "a.parquet", words)}, tokenizer=str(model)
    )
    tokenizer = open_tokenizer(model)
    source = TokenSource(tmp_path / "out", manifest, "web")
    for number, text in enumerate(words):
        read = source.read(number, 0, int(source.lengths[number]))
        assert np.array_equal(read, tokenizer.encode(text.encode()))
    assert source.digest.startswith(tokenizer.name) and manifest.dtype == np.dtype("<u2")


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    before = set(children_of(os.getpid()))  # of other tests
    yield
    assert list(tmp_path.rglob(".*.*.[0-9]*")) == []
    assert set(children_of(os.getpid())) <= before
