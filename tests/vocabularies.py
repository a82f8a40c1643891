"""Vocabularies of byte pairs, as files in both formats, and texts that are hard on them."""

import base64
import json
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from keepstep.llama.tokenizer.vocabulary import SPECIAL, WORDS, _bytes_of_letters

SCRIPTS = """
Ça dépend: naïve cœur, Straße, ŁÓDŹ, Þórður, ĳsselmeer. Ελληνικά, Кириллица и ещё, Հայերեն, ქართული.
עברית עם נִקּוּד, العربية مع تَشْكِيل، فارسی می‌خواهم, हिन्दी क्षत्रिय, বাংলা, தமிழ், ไทยไม่มีช่องว่าง, ខ្មែរ, မြန်မာ,
བོད་ཡིག.
中文没有空格，繁體字，日本語のテキスト、カタカナ、한국어 띄어쓰기. አማርኛ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ 𐍈𐌰𐌽 𒀀𒁀 🏳️‍🌈👩‍👩‍👧‍👦🇺🇳 ﷽
①②③ ⅷ ½ Ⅻ ٣٤٥ १२३ 12345678 1e-10 0xFF
I'll you've they'RE IT'S don'T ''' 'll  'S ſ'ſ K'ſ we'Ve\u2019s
"""


def adversarial() -> Iterator[str]:
    """White space of every kind, marks that look special, runs longer than a cut, all of one plane."""
    yield ""
    yield " "
    yield "\n \r\n\t \u00a0\u2003\u3000\x1c\x1d\x85\v\f  x \n\n  y   \n"
    yield "<|begin_of_text|>hi<|eot_id|><|start_header_id|>system<|end_header_id|>\n\n<|python_tag|>"
    yield "\ufeff\x00\x01\x7f\u200b\u200d\u202e\ufffe\uffff\U0010ffff" + "e\u0301" * 50 + "\u0300" * 300
    yield "".join(chr(c) for c in range(0x3000) if not 0xD800 <= c < 0xE000)
    yield "a" * 25_000 + " " + "b" * 25_001 + " " * 60_001 + "é" * 25_002 + "\n" * 3
    yield ("word " * 79_999) + "across" + "x" * 30_000 + "中" * 400_000
    yield "'" * 1000 + "'s" * 1000 + "ab" * 3000 + "1" * 1001
    yield SCRIPTS


def library() -> str:
    """Some modules of the standard library, end to end."""
    root = Path(sysconfig.get_path("stdlib"))
    return "".join(
        (root / name).read_text() for name in ("argparse.py", "ast.py", "typing.py", "re/_parser.py")
    )


def trained(size: int, text: str) -> dict[bytes, int]:
    """Ranks of a vocabulary that is trained on a text, cut into words as Llama 3 does."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    letters = _bytes_of_letters()
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = _pre_tokenizer()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator([text], trainer)
    ordered = sorted(model.get_vocab().items(), key=lambda entry: entry[1])
    return {bytes(letters[letter] for letter in entry): rank for entry, rank in ordered}


def write_tiktoken(ranks: Mapping[bytes, int], path: Path) -> Path:
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for piece, rank in ranks.items()))
    return path


def write_hugging_face(ranks: Mapping[bytes, int], path: Path) -> Path:
    """The same vocabulary as transformers would convert it: every pair of entries whose sum is an entry."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models

    names = {byte: letter for letter, byte in _bytes_of_letters().items()}

    def entry(piece: bytes) -> str:
        return "".join(names[byte] for byte in piece)

    merges = []
    for piece in ranks:
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        both = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += sorted(both, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    model = tokenizers.Tokenizer(
        models.BPE(
            vocab={entry(piece): rank for piece, rank in ranks.items()},
            merges=[(entry(a), entry(b)) for a, b in merges], ignore_merges=True,
        )
    )  # fmt: skip
    model.pre_tokenizer = _pre_tokenizer()  # type: ignore[assignment]
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    path.write_text(model.to_str())
    assert json.loads(path.read_text())["model"]["ignore_merges"]
    return path


def _pre_tokenizer() -> object:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
