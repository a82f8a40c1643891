import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from keepstep.llama.tokenizer import ByteTokenizer, Tokenizer


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
    framed = np.array([tokenizer.bos, ord("a"), tokenizer.eos, tokenizer.pad])
    assert tokenizer.decode(framed) == "a"


def test_half_a_character_is_replaced() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("é".encode())[:1]) == "\N{REPLACEMENT CHARACTER}"
