"""Generating, against transformers' generate with its cache on the same weights, in pairs that take turns.

Both answer the same prompts greedily, the same number of tokens, without stop tokens, on one thread.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keepstep.llama.generation import Decoder, Sampling, generate
from keepstep.llama.weights.sources import open_source

PAIRS, PROMPT, MOST = 9, 64, 64


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def compare(theirs: Any, ours: Decoder, rows: int) -> dict[str, float]:
    prompts = torch.randint(0, 256, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))

    def reference() -> torch.Tensor:
        answer: torch.Tensor = theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=MOST, do_sample=False,
            eos_token_id=None, pad_token_id=258,
        )  # fmt: skip
        return answer[:, PROMPT:]

    def own() -> torch.Tensor:
        tokens = [one.token for one in generate(ours, list(prompts), most=MOST, sampling=Sampling())]
        return torch.tensor(tokens).view(MOST, rows).T

    same = float((reference() == own()).float().mean())
    pairs = [(seconds(reference), seconds(own)) for _ in range(PAIRS)]
    return {
        f"vs_huggingface_batch_{rows}": statistics.median(a / b for a, b in pairs),
        f"tokens_per_s_batch_{rows}": rows * MOST / statistics.median(b for _, b in pairs),
        f"huggingface_tokens_per_s_batch_{rows}": rows * MOST / statistics.median(a for a, _ in pairs),
        f"same_tokens_batch_{rows}": same,
    }


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=260, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    theirs: Any = LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = Decoder(open_source(Path(folder)), dtype=torch.float32, device=torch.device("cpu"))
    figures: dict[str, float] = {}
    for rows in (1, 8):
        figures |= compare(theirs, ours, rows)
    figures["vs_huggingface"] = min(figures[f"vs_huggingface_batch_{rows}"] for rows in (1, 8))
    for name, value in figures.items():
        print(f"{name:34} {value:10.3f}")
    context = {
        "model": config.to_diff_dict(), "prompt": PROMPT, "new_tokens": MOST, "pairs": PAIRS, "threads": 1,
        "cores": os.cpu_count(), "torch": torch.__version__, "load_1min": os.getloadavg()[0],
    }  # fmt: skip
    rounded = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"bench": "generate", "figures": rounded, "context": context}))


if __name__ == "__main__":
    main()
