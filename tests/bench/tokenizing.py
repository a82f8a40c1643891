"""Tokenising: Llama 3's tokenizer against tiktoken's own encode, and text to shards per core.

Not tokenize.py: that would stand before the standard library's module of this name in every bench.

With the real vocabulary where the package of its authors is installed, else one that is trained here.
"""

import importlib.util
import json
import os
import resource
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import tiktoken

sys.path.insert(0, str(Path(__file__).parents[1]))

import vocabularies
from keepstep.llama.data.tokenise import tokenise
from keepstep.llama.tokenizer import open_tokenizer
from keepstep.llama.tokenizer.vocabulary import SPECIAL, WORDS

ROUNDS, TEXT_BYTES, COPIES = 9, 4 << 20, 16


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def core_seconds(work: Callable[[], object]) -> float:
    """What the work and the processes that it started took of cores, however many others wanted them."""

    def used() -> float:
        of = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in of)

    begun = used()
    work()
    return used() - begun


def vocabulary(folder: Path) -> Path:
    found = importlib.util.find_spec("llama_models")
    if found is not None and found.submodule_search_locations:
        return Path(found.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    text = vocabularies.library() + vocabularies.SCRIPTS
    return vocabularies.write_tiktoken(vocabularies.trained(8000, text), folder / "tokenizer.model")


def texts() -> list[str]:
    """Modules of the standard library, in the order of their names."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = path.read_bytes().decode(errors="replace")
        found.append(text)
        size += len(text.encode())
        if size > TEXT_BYTES:
            break
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = vocabulary(folder)
        ours = open_tokenizer(model)
        base = ours.vocabulary - len(SPECIAL)
        ranks = {ours.raw(np.array([token])): token for token in range(base)}
        reference = tiktoken.Encoding(
            "reference", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=dict(ours.special)
        )
        corpus = texts()
        encoded = [text.encode() for text in corpus]
        size = sum(map(len, encoded)) / 1e6
        assert all(
            ours.encode(data).tolist() == reference.encode_ordinary(text)
            for data, text in zip(encoded, corpus, strict=True)
        )
        pairs = [
            (
                seconds(lambda: [reference.encode_ordinary(text) for text in corpus]),
                seconds(lambda: [ours.encode(data) for data in encoded]),
            )
            for _ in range(ROUNDS)
        ]
        lines = folder / "text.jsonl"
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus * COPIES))

        cores = len(os.sched_getaffinity(0))

        def shards() -> None:
            tokenise(
                folder / "shards", {"library": lines}, tokenizer=str(model), workers=cores, unit_bytes=4 << 20
            )  # fmt: skip

        begun = time.perf_counter()
        on_cores = core_seconds(shards)
        wall = time.perf_counter() - begun
    figures = {
        "vs_reference": statistics.median(a / b for a, b in pairs),
        "mb_per_s": size / statistics.median(b for _, b in pairs),
        "reference_mb_per_s": size / statistics.median(a for a, _ in pairs),
        "shards_mb_per_s_per_core": COPIES * size / on_cores,
        "shards_mb_per_s": COPIES * size / wall,
    }
    for name, value in figures.items():
        print(f"{name:28} {value:10.3f}")
    context = {
        "vocabulary": ours.vocabulary, "text_mb": round(size, 2), "rounds": ROUNDS, "cores": cores,
        "tiktoken": tiktoken.__version__, "load_1min": os.getloadavg()[0],
        "limit": "shards at 5 MB/s of text per second of a core, the start of the processes included",
    }  # fmt: skip
    rounded = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"bench": "tokenize", "figures": rounded, "context": context}))


if __name__ == "__main__":
    main()
