"""Samples by number: packed right, shuffled by (seed, epoch), used exactly once whatever happens."""

import itertools
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keepstep.core.errors import InputError
from keepstep.llama.data import Batch, Corpus, Cut, open_documents
from keepstep.llama.data.packing import Course, Epoch, permutation
from keepstep.llama.tokenizer import ByteTokenizer, Tokens

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos, TOKENIZER.eos


class Words:
    """A tokenizer of another kind: a token is up to four bytes, so texts cannot be sliced."""

    name, vocabulary, sliceable = "words", 1 << 33, False
    bos, eos, pad = 1 << 32, (1 << 32) + 1, (1 << 32) + 2
    special: Mapping[str, int] = {}
    stops: frozenset[int] = frozenset()

    def encode(self, text: bytes) -> Tokens:
        return np.array(
            [int.from_bytes(text[k : k + 4], "big") for k in range(0, len(text), 4)], dtype=np.int64
        )

    def raw(self, tokens: Tokens) -> bytes:
        raise NotImplementedError

    def decode(self, tokens: Tokens) -> str:
        raise NotImplementedError


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Nine documents of very different lengths, told apart by their letter."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for number, length in enumerate([1, 2, 3, 50, 7, 300, 20, 20, 90]):
        part = folder / ("deep" if number % 2 else ".") / f"{number}.txt"
        part.write_text(chr(ord("a") + number) * length)
    return folder


def corpus(path: Path, *, seed: int = 0, seq: int = 16, sequences_per_step: int = 4) -> Corpus:
    return Corpus.open("text", path, seed=seed, seq=seq, sequences_per_step=sequences_per_step)


def rows(*batches: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.tokens.tolist()]


def test_what_is_held_out_follows_from_each_document_alone(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(200):
        (texts / f"{number:03}.txt").write_text(f"document {number % 150} " * (3 + number % 5 * (number < 0)))

    def sides(holdout: float, seed: int = 0) -> tuple[set[bytes], set[bytes]]:
        chosen = Corpus.open("text", texts, seed=seed, seq=8, sequences_per_step=1, holdout=holdout)
        both: list[set[bytes]] = []
        for part in (chosen, chosen.of_held()):
            text = part.streams[0].text
            whole = [text.read(k, 0, int(n)) for k, n in enumerate(text.lengths)]
            both.append({bytes(tokens.tolist()) for tokens in whole})
        return both[0], both[1]

    trained, held = sides(0.1)
    assert len(trained) + len(held) == 150 and 5 < len(held) < 30, "copies are on one side"
    assert sides(0.1, seed=7) == (trained, held)
    assert held < sides(0.3)[1]
    (texts / "999.txt").write_text("one more")
    assert sides(0.1)[1] - {b"one more"} == held
    with pytest.raises(InputError, match="is nothing"):
        sides(1e-9)


def test_a_checkpoint_of_text_with_another_holdout_is_refused(texts: Path) -> None:
    made = [
        Corpus.open("text", texts, seed=0, seq=8, sequences_per_step=1, holdout=share) for share in (0, 0.3)
    ]
    with pytest.raises(InputError, match="other data: digest"):
        made[1].check(made[0].position(3))


def test_shapes_and_types(texts: Path) -> None:
    batch = corpus(texts).sequences(0, 1, 4)
    assert batch.tokens.shape == (3, 17) and batch.tokens.dtype == np.int64
    assert batch.documents.shape == (3, 16) and batch.documents.dtype == np.int32
    assert batch.positions.shape == (3, 16) and batch.positions.dtype == np.int64


def test_documents_and_positions_follow_the_tokens(texts: Path) -> None:
    """Against a count by hand: a new document begins at each bos, and only there."""
    chosen = corpus(texts, seq=40)
    batch = chosen.samples(0, chosen.samples_per_epoch)
    seen_starts = 0
    for tokens, documents, positions in zip(*batch, strict=True):
        document = position = 0
        for k, token in enumerate(tokens[:-1]):
            if k and token == BOS:
                document, position, seen_starts = document + 1, 0, seen_starts + 1
            assert (documents[k], positions[k]) == (document, position)
            position += 1
        # Within a document there is one letter only, and eos is its last token.
        for _, part in itertools.groupby(zip(documents, tokens[:-1], strict=True), key=lambda pair: pair[0]):
            letters = [token for _, token in part]
            assert len(set(letters) - {BOS, EOS}) <= 1 and EOS not in letters[:-1]
    assert seen_starts >= 4


def test_an_epoch_predicts_every_token_once(texts: Path) -> None:
    """Put back in the order of the stream, targets are the whole stream but for its first token and tail."""
    chosen = corpus(texts, seq=16)
    source = chosen.streams[0]
    epoch = source.epoch(source.course.place(0)[0])
    batch = chosen.samples(0, chosen.samples_per_epoch)
    order = np.argsort(epoch.sequences)
    stream = [BOS]
    for row in batch.tokens[order]:
        assert row[0] == stream[-1]  # overlaps by one token with the one before
        stream += row[1:].tolist()
    documents = open_documents("text", texts)
    whole: list[int] = []
    for number in epoch.order:
        text = documents.read(int(number), 0, int(documents.length[number]))
        whole += [BOS, *text, EOS]
    assert stream == whole[: len(stream)] and len(whole) - len(stream) < 16
    assert chosen.tokens == len(whole)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40),
    seq=st.integers(1, 33),
    seed=st.integers(-(2**63), 2**64),
)
def test_pieces_cover_the_stream(lengths: list[int], seq: int, seed: int) -> None:
    table = np.array(lengths, dtype=np.int64)
    epoch = Epoch(table, seq=seq, seed=seed, epoch=3)
    used: Counter[tuple[int, int]] = Counter()
    for sequence in range(len(epoch.sequences)):
        pieces = epoch.pieces(sequence)
        assert sum(piece.stop - piece.start for piece in pieces) == seq + 1
        for piece in pieces:
            assert 0 <= piece.start < piece.stop <= lengths[piece.document]
        tokens = [(piece.document, k) for piece in pieces for k in range(piece.start, piece.stop)]
        used.update(tokens[1:])
    assert all(count == 1 for count in used.values())
    assert len(used) == (sum(lengths) - 1) // seq * seq


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40),
    stages=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 33)), max_size=4),
    last=st.integers(1, 33),
    seed=st.integers(0, 2**64),
)
def test_stages_use_every_token_of_an_epoch_once_at_most(
    lengths: list[int], stages: list[tuple[int, int]], last: int, seed: int
) -> None:
    """And all of it but what is too short for a sequence, at each stage's end and at the epoch's."""
    table = np.array(lengths, dtype=np.int64)
    tokens = int(table.sum())
    assume(all(seq < tokens for seq in (last, *(seq for _, seq in stages))))
    course = Course(tokens, [*stages, (None, last)])
    samples = sum(count for count, _ in stages) + 2 * (tokens // last)
    used: dict[int, Counter[tuple[int, int]]] = {}
    for sample in range(samples):
        part, sequence = course.place(sample)
        pieces = Epoch(table, seed=seed, **asdict(part)).pieces(sequence)
        targets = [(piece.document, k) for piece in pieces for k in range(piece.start, piece.stop)][1:]
        used.setdefault(part.epoch, Counter()).update(targets)
        stage = next((k for k, n in enumerate(np.cumsum([n for n, _ in stages])) if sample < n), len(stages))
        assert len(targets) == part.seq == [*(seq for _, seq in stages), last][stage]
    assert all(count == 1 for epoch in used.values() for count in epoch.values())
    assert sorted(used) == list(range(len(used)))
    for epoch in list(used)[:-1]:
        assert len(used[epoch]) >= tokens - 1 - max(last, *(seq for _, seq in stages), 0)


def test_later_stages_count_on_and_a_restart_finds_them(texts: Path) -> None:
    def staged(after: int = 3, sequences: int = 2) -> Corpus:
        stages = [
            Cut(after_steps=after, seq=32, sequences=sequences),
            Cut(after_steps=8, seq=32, sequences=3),
        ]
        return Corpus.open("text", texts, seed=1, seq=16, sequences_per_step=4, stages=stages)

    whole = staged()
    shapes = [whole.sequences(step, 0, whole.cut(step).sequences).tokens.shape for step in range(10)]
    assert shapes == 3 * [(4, 17)] + 5 * [(2, 33)] + 2 * [(3, 33)]
    assert whole.position(3)["samples"] == 12 and whole.position(9)["samples"] == 12 + 10 + 3
    assert rows(whole.sequences(8, 0, 3)) == rows(*(staged().sequences(8, k, k + 1) for k in range(3)))
    plain = corpus(texts, seed=1)
    assert rows(whole.sequences(0, 0, 4)) != rows(plain.sequences(0, 0, 4)), "a stage that ends has a part"
    staged(sequences=2).check(whole.position(9))
    staged(sequences=1).check(whole.position(2))  # a stage that has not begun may change
    for other in (staged(sequences=1), plain):
        with pytest.raises(InputError, match="other data"):
            other.check(whole.position(9))
    with pytest.raises(InputError, match="end of the present stage 3 there, 4 here"):
        staged(after=4).check(whole.position(2))


def test_every_sample_once_over_restarts_and_layout_changes(texts: Path) -> None:
    """Four replicas, a crash that rolls back, two replicas, one: what counts is what a step used last."""
    whole = corpus(texts, sequences_per_step=4)
    steps = 2 * whole.samples_per_epoch // 4
    used: dict[int, list[tuple[int, ...]]] = {}
    for replicas, first, stop in ((4, 0, 9), (2, 5, 12), (1, 12, steps), (4, steps - 3, steps)):
        for step in range(first, stop):
            share = 4 // replicas
            fresh = corpus(texts, sequences_per_step=4)  # a restarted rank knows the step and nothing else
            used[step] = rows(*(fresh.sequences(step, k * share, (k + 1) * share) for k in range(replicas)))
    together = [row for step in range(steps) for row in used[step]]
    assert together == rows(whole.samples(0, 4 * steps))
    per_epoch = whole.samples_per_epoch
    first_epoch, second_epoch = whole.samples(0, per_epoch), whole.samples(per_epoch, per_epoch)
    assert len(set(zip(*first_epoch.tokens.T, strict=True))) > 1
    numbers = Counter(divmod(step * 4 + k, per_epoch) for step in range(steps) for k in range(4))
    assert set(numbers.values()) == {1}
    assert rows(first_epoch) != rows(second_epoch)  # another order of documents


def test_seed_and_epoch_decide_the_order(texts: Path) -> None:
    assert rows(corpus(texts, seed=1).samples(0, 20)) == rows(corpus(texts, seed=1).samples(0, 20))
    assert rows(corpus(texts, seed=1).samples(0, 20)) != rows(corpus(texts, seed=2).samples(0, 20))


def test_permutations_are_fixed_for_ever() -> None:
    """A checkpoint of today must find the same order in every later version."""
    assert permutation(10, 0, 0, 0).tolist() == PERMUTATION
    assert sorted(permutation(1000, 5, 1).tolist()) == list(range(1000))
    assert permutation(1000, 5, 1).tolist() != permutation(1000, 1, 5).tolist()
    assert permutation(0, 1).tolist() == []


def test_a_tokenizer_that_cannot_slice_gives_the_same_packing(texts: Path) -> None:
    words = Corpus.open("text", texts, seed=0, seq=8, sequences_per_step=1, tokenizer=Words())
    assert words.tokens == sum(-(-n // 4) + 2 for n in [1, 2, 3, 50, 7, 300, 20, 20, 90])
    batch = words.samples(0, words.samples_per_epoch)
    assert np.isin(batch.tokens, [Words.bos, Words.eos]).any()
    assert words.digest != corpus(texts).digest


def test_a_single_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "plays.txt"
    path.write_bytes(b"\n\nfirst\nstill first\n\n\nsecond\r\n\r\nthird\n  \t\nfourth \xff bad\n\nlast")
    documents = open_documents("text", path)
    texts = [documents.read(k, 0, int(documents.length[k])) for k in range(len(documents))]
    assert texts == [b"first\nstill first", b"second", b"third", b"last"]
    assert documents.skipped == 1


def test_what_is_not_text_is_skipped_and_counted(texts: Path) -> None:
    (texts / "image.bin").write_bytes(b"\x89PNG\xff\xfe")
    (texts / "empty.txt").touch()
    (texts / ".hidden").write_text("not for training")
    chosen = corpus(texts)
    assert chosen.skipped == 1
    (texts / "image.bin").unlink()
    assert corpus(texts).digest == chosen.digest


def test_text_that_ends_within_a_character_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("é".encode()[:1])
    with pytest.raises(InputError, match="no text to train on"):
        open_documents("text", tmp_path)


def test_restoring_with_other_data_is_refused(texts: Path) -> None:
    here = corpus(texts, seed=3)
    recorded = here.position(60)
    assert recorded["samples"] == 240
    corpus(texts, seed=3).check(recorded)
    with pytest.raises(InputError, match="seed 3 there, 4 here"):
        corpus(texts, seed=4).check(recorded)
    with pytest.raises(InputError, match="samples used 240 there, 480 here"):
        corpus(texts, seed=3, sequences_per_step=8).check(recorded)
    with pytest.raises(InputError, match="sequence length 16 there, 32 here"):
        corpus(texts, seed=3, seq=32).check(recorded)
    (texts / "0.txt").write_text("b")
    other = corpus(texts, seed=3)
    with pytest.raises(InputError) as caught:
        other.check(recorded)
    assert here.digest in str(caught.value) and other.digest in str(caught.value)


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("web", None, "no source of data"),
        ("text", None, "needs a path"),
        ("text", "missing", "no such file or folder"),
        ("text", "hollow", "no text to train on"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path: Path, source: str, path: str | None, message: str) -> None:
    (tmp_path / "hollow").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        open_documents(source, None if path is None else tmp_path / path)
    assert caught.value.where and caught.value.next


def test_text_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("short")
    with pytest.raises(InputError, match="7 tokens, one sequence needs 17"):
        corpus(tmp_path)
    assert corpus(tmp_path, seq=6).samples_per_epoch == 1


def test_a_file_that_shrinks_while_training(texts: Path) -> None:
    chosen = corpus(texts)
    os.truncate(texts / "deep" / "5.txt", 10)
    with pytest.raises(InputError, match="changed while the job"):
        chosen.samples(0, chosen.samples_per_epoch)


def test_the_default_corpus_is_there_and_large_enough() -> None:
    chosen = Corpus.open(seed=0, seq=256, sequences_per_step=4)
    assert chosen.tokens > 2_000_000 and chosen.source == "stdlib"
    text = TOKENIZER.decode(chosen.samples(0, 50).tokens.ravel())
    assert "def " in text and "import " in text


PERMUTATION = [0, 7, 4, 9, 2, 1, 6, 8, 5, 3]
