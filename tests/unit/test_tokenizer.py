"""Bytes and Llama 3's byte pairs: equal to the reference, in both formats, whatever the text."""

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vocabularies
from keepstep.core.errors import InputError
from keepstep.llama.tokenizer import ByteTokenizer, Message, Tokenizer, dialog, open_tokenizer
from keepstep.llama.tokenizer.vocabulary import SPECIAL, cuts

Formats = dict[str, Tokenizer]


@given(st.text())
def test_text_survives_the_round_trip(text: str) -> None:
    tokenizer: Tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text.encode())
    assert tokens.dtype == np.int64 and tokenizer.decode(tokens) == text
    assert len(tokens) == len(text.encode()) and tokenizer.sliceable


def test_special_tokens_are_apart_from_bytes_and_say_nothing() -> None:
    tokenizer = ByteTokenizer()
    special = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
    assert len(special) == 3 and min(special) > 255 and max(special) < tokenizer.vocabulary
    assert set(tokenizer.special.values()) == special
    framed = np.array([tokenizer.bos, ord("a"), tokenizer.eos, tokenizer.pad])
    assert tokenizer.decode(framed) == "a"


def test_half_a_character_is_replaced() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("é".encode())[:1]) == "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocabulary")
    ranks = vocabularies.trained(2000, vocabularies.library() + vocabularies.SCRIPTS)
    assert len(ranks) == 2000
    return {
        "tiktoken": vocabularies.write_tiktoken(ranks, folder / "tokenizer.model"),
        "hugging_face": vocabularies.write_hugging_face(ranks, folder / "tokenizer.json"),
    }


@pytest.fixture(scope="module")
def formats(files: dict[str, Path]) -> Formats:
    return {name: open_tokenizer(path) for name, path in files.items()}


def same_as_libraries(formats: Formats, files: dict[str, Path], text: str) -> None:
    """Ours in both formats, and each library by itself on the same file, where it needs no cuts."""
    import tokenizers

    tokens = formats["tiktoken"].encode(text.encode())
    assert tokens.dtype == np.int64
    assert np.array_equal(tokens, formats["hugging_face"].encode(text.encode()))
    assert all(formats[name].decode(tokens) == text for name in formats)
    if list(cuts(text)) in ([text], []):
        library = tokenizers.Tokenizer.from_file(str(files["hugging_face"]))
        library.encode_special_tokens = True
        assert library.encode(text, add_special_tokens=False).ids == tokens.tolist()


def test_both_formats_equal_over_code_scripts_and_adversarial_text(
    formats: Formats, files: dict[str, Path]
) -> None:
    for text in [*vocabularies.adversarial(), vocabularies.library()]:
        same_as_libraries(formats, files, text)


@given(st.text(max_size=200))
def test_both_formats_equal_on_any_text(formats: Formats, text: str) -> None:
    tokens = formats["tiktoken"].encode(text.encode())
    assert np.array_equal(tokens, formats["hugging_face"].encode(text.encode()))
    assert formats["tiktoken"].decode(tokens) == text


def reference_cuts(text: str) -> list[str]:
    """The rule, character by character: blocks, and in each at most so many of one kind in a row."""
    parts = []
    for begin in range(0, len(text), 400_000):
        block = text[begin : begin + 400_000]
        start, run = 0, 0
        for at, letter in enumerate(block):
            run = run + 1 if at and block[at - 1].isspace() == letter.isspace() else 1
            if run > 25_000:
                parts.append(block[start:at])
                start, run = at, 1
        parts.append(block[start:])
    return parts


def test_texts_are_cut_where_runs_are_too_long() -> None:
    chance = random.Random(3)
    texts = list(vocabularies.adversarial())
    for _ in range(12):
        lengths = [chance.choice([1, 7, 24_999, 25_000, 25_001, 50_000, 75_003]) for _ in range(9)]
        texts.append("".join((" " if k % 2 else "x") * length for k, length in enumerate(lengths)))
    assert any(len(reference_cuts(text)) > 5 for text in texts)
    for text in texts:
        assert list(cuts(text)) == reference_cuts(text)


def test_special_tokens_are_the_last_256_and_text_never_becomes_one(formats: Formats) -> None:
    for tokenizer in formats.values():
        assert len(tokenizer.special) == 256 and tokenizer.vocabulary == 2256
        assert [tokenizer.special[mark] for mark in SPECIAL] == list(range(2000, 2256))
        assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (2000, 2001, 2004)
        assert tokenizer.stops == {2001, 2008, 2009}
        assert tokenizer.encode("".join(SPECIAL).encode()).max() < 2000
        assert tokenizer.raw(np.array([2000, 65, 2255, 2256, -1])) == tokenizer.raw(np.array([65]))
    assert len({tokenizer.name for tokenizer in formats.values()}) == 2


def test_a_dialog_has_a_header_before_each_message(formats: Formats) -> None:
    tokenizer = formats["tiktoken"]
    messages = [Message("system", "Be brief."), Message("user", " hi<|eot_id|>\n"), Message("tool", "42")]
    tokens = dialog(tokenizer, messages).tolist()
    names = {token: mark for mark, token in tokenizer.special.items()}
    text, shown = b"", ""
    for token in tokens:
        if token in names:
            shown, text = shown + text.decode() + f"[{names[token][2:-2]}]", b""
        else:
            text += tokenizer.raw(np.array([token]))
    assert shown + text.decode() == (
        "[begin_of_text][start_header_id]system[end_header_id]\n\nBe brief.[eot_id]"
        "[start_header_id]user[end_header_id]\n\n hi<|eot_id|>\n[eot_id]"
        "[start_header_id]ipython[end_header_id]\n\n42[eot_id]"
        "[start_header_id]assistant[end_header_id]\n\n"
    )
    with pytest.raises(InputError, match="'boss' is no role"):
        dialog(tokenizer, [Message("boss", "")])
    with pytest.raises(InputError, match="has no chat format"):
        dialog(ByteTokenizer(), messages)


def test_bytes_that_are_no_text_are_refused_with_their_place(formats: Formats) -> None:
    for tokenizer in formats.values():
        with pytest.raises(InputError, match="byte 2: the text is no UTF-8"):
            tokenizer.encode(b"ab\xff")
        with pytest.raises(InputError, match="no UTF-8"):
            tokenizer.encode(b"\xed\xa0\x80")  # half a surrogate pair


def test_a_folder_or_nothing_names_a_tokenizer(files: dict[str, Path], formats: Formats) -> None:
    assert open_tokenizer(files["tiktoken"].parent).name == formats["tiktoken"].name
    assert open_tokenizer(None).name == open_tokenizer("bytes").name == "bytes-1"


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    return lambda content: b"\n".join(change(content.splitlines()))


WITHOUT_BYTES = b"".join(base64.b64encode(b"%d" % k) + b" %d\n" % (k - 10) for k in range(10, 99))


@pytest.mark.parametrize(
    ("format_", "damage", "message"),
    [
        ("tiktoken", lambda content: content[:-8], "line 2,000 is not an entry"),
        ("tiktoken", lines(lambda rows: [*rows[:5], b"?? 5", *rows[6:]]), "line 6 is not an entry"),
        ("tiktoken", lines(lambda rows: rows[:7] + rows[8:]), "line 8 has rank 8"),
        ("tiktoken", lines(lambda rows: [*rows, rows[0].split()[0] + b" 2000"]), "for the second time"),
        ("tiktoken", lambda content: WITHOUT_BYTES, "256 single bytes are missing"),
        ("tiktoken", lambda content: b"", "256 single bytes are missing"),
        ("hugging_face", lambda content: content[:-9], "JSONDecodeError"),
        ("hugging_face", lambda content: b"{}", "KeyError: 'model'"),
        ("hugging_face", lambda content: content.replace(b'"BPE"', b'"Unigram"'), "its model is Unigram"),
        ("hugging_face", lambda content: content.replace(b"<|end_of_text|>", b"<eos>"), "no special token"),
        ("hugging_face", lambda content: content.replace(b"_merges\":true", b"_merges\":7"), "invalid type"),
        ("hugging_face", lambda c: c.replace(b'"vocab":{', b'"vocab":{"a b":1999,'), "stands for no byte"),
    ],
    ids=[
        "torn", "no base64", "a line lost", "twice", "no bytes", "empty", "torn json", "other json",
        "other model", "no eos", "other type", "no letter",
    ],
)  # fmt: skip
def test_damaged_vocabularies_are_named(
    files: dict[str, Path], tmp_path: Path, format_: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    content = files[format_].read_bytes()
    if format_ == "hugging_face":
        content = json.dumps(json.loads(content), separators=(",", ":")).encode()
    path = tmp_path / files[format_].name
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    with pytest.raises(InputError) as caught:
        open_tokenizer(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and caught.value.next


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(InputError, match="there is no tokenizer"):
            open_tokenizer(path)


@pytest.fixture(scope="module")
def real() -> Path:
    """Llama 3's own vocabulary, as the package of its authors brings it."""
    return Path(pytest.importorskip("llama_models.llama3.tokenizer").__file__).with_name("tokenizer.model")


@pytest.mark.slow
def test_the_real_vocabulary_equals_its_authors_package_in_both_formats(real: Path, tmp_path: Path) -> None:
    from llama_models.llama3.tokenizer import Tokenizer as Reference
    from llama_models.tokenizer_utils import load_bpe_file

    reference, ours = Reference(real), open_tokenizer(real)
    theirs = vocabularies.write_hugging_face(load_bpe_file(real), tmp_path / "tokenizer.json")
    hugging_face = open_tokenizer(theirs)
    assert ours.vocabulary == hugging_face.vocabulary == reference.n_words == 128_256
    assert ours.special == reference.special_tokens == hugging_face.special
    assert (ours.bos, ours.eos, ours.pad) == (reference.bos_id, reference.eos_id, reference.pad_id)
    assert ours.stops == set(reference.stop_tokens)
    for text in [*vocabularies.adversarial(), vocabularies.library()]:
        tokens = ours.encode(text.encode())
        assert tokens.tolist() == reference.encode(text, bos=False, eos=False)
        assert np.array_equal(tokens, hugging_face.encode(text.encode()))
        assert ours.decode(tokens) == hugging_face.decode(tokens) == text == reference.decode(tokens.tolist())


@pytest.mark.slow
def test_the_chat_format_equals_its_authors_package(real: Path) -> None:
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as Reference

    said = [("system", "Be brief."), ("user", " hi <|eot_id|>\n"), ("assistant", "ok"), ("tool", "42")]
    chat = ChatFormat(Reference(real))
    expected = chat.encode_dialog_prompt([RawMessage(role=role, content=text) for role, text in said]).tokens
    assert dialog(open_tokenizer(real), [Message(*each) for each in said]).tolist() == expected
