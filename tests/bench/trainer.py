"""The built-in trainer against Hugging Face's Llama in one process, and its layouts against one process.

    .venv/bin/python tests/bench/trainer.py

Same model, same batch, same threads; pairs are interleaved, so that a busy machine is busy for both. The last
line is one JSON object; ratios are ours over theirs in tokens per second: above 1 is faster.
"""

import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # two spinning threads on a machine that others use stand still
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from keepstep.llama import parallel
from keepstep.llama.data import Batch
from keepstep.llama.initial import initialise
from keepstep.llama.job import TrainJob
from keepstep.llama.trainer import Trainer
from keepstep.session import current
from rank_gang import run_gang

SEQ, SEQUENCES = 256, 4
MODEL = {
    "layers": 4, "dim": 256, "ffn_dim": 768, "heads": 8, "kv_heads": 4, "vocabulary": 260, "max_seq": 2048
}  # fmt: skip
PAIRS, ROUNDS, STEPS = 15, 5, 12
LAYOUTS = {"one": (1, 1, 1), "dp2": (2, 1, 1), "pp2": (1, 2, 1), "tp2": (1, 1, 2), "d3": (2, 2, 2)}


class Noise:
    """One document a sequence: what both sides can train on without a mask."""

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        count = stop - start
        chance = np.random.default_rng([step, start])
        return Batch(
            chance.integers(0, MODEL["vocabulary"], (count, SEQ + 1)),
            np.zeros((count, SEQ), np.int32),
            np.tile(np.arange(SEQ), (count, 1)),
        )


def trainer(layout: tuple[int, int, int], micro_batch: int) -> Trainer:
    dp, pp, tp = layout
    job = TrainJob.parse(
        {
            "job": "bench",
            "layout": {"dp": dp, "pp": pp, "tp": tp},
            "model": MODEL,
            "steps": 10_000,
            "batch": {"global_tokens": SEQ * SEQUENCES, "seq": SEQ, "micro_batch": micro_batch},
            "timeout_s": 60,
        }
    )
    device = torch.device("cpu")
    groups = parallel.join(job.layout, device, timeout_s=60)
    ours = Trainer(job, groups, Noise(), device=device, session=current())
    initialise(ours.state, job.shape, seed=0)
    ours.optimizer.publish()
    return ours


def seconds(step: Any) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def against_hugging_face() -> dict[str, Any]:
    """In a forked child, so that the parent stays fit for forking."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=MODEL["dim"], intermediate_size=MODEL["ffn_dim"], num_hidden_layers=MODEL["layers"],
        num_attention_heads=MODEL["heads"], num_key_value_heads=MODEL["kv_heads"],
        vocab_size=MODEL["vocabulary"], max_position_embeddings=MODEL["max_seq"], tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    source = Noise()
    theirs_step = 0

    def theirs() -> None:
        nonlocal theirs_step
        tokens = torch.from_numpy(source.sequences(theirs_step, 0, SEQUENCES).tokens)[:, :-1]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs_step += 1

    ours = trainer((1, 1, 1), SEQUENCES)
    for _ in range(3):
        seconds(theirs), seconds(ours.step)
    pairs = [(seconds(theirs), seconds(ours.step)) for _ in range(PAIRS)]
    tokens = SEQ * SEQUENCES
    return {
        "vs_huggingface": statistics.median(a / b for a, b in pairs),
        "tokens_per_s": tokens / statistics.median(b for _, b in pairs),
        "huggingface_tokens_per_s": tokens / statistics.median(a for a, _ in pairs),
    }


def of_layout(layout: tuple[int, int, int]) -> dict[str, float]:
    """On each rank: seconds of a step, and its share of memory."""
    if layout == (1, 1, 1):
        torch.set_num_threads(2)
    ours = trainer(layout, 1)
    for _ in range(3):
        ours.step()
    step_s = statistics.median(seconds(ours.step) for _ in range(STEPS))
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    pss = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) / 1e3
    parallel.leave()
    return {"step_s": step_s, "pss_mb": pss}


def main() -> None:
    figures: dict[str, float] = run_gang(1, against_hugging_face, deadline_s=300)[0]
    steps: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    memory: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, layout in LAYOUTS.items():
            ranks = run_gang(int(np.prod(layout)), partial(of_layout, layout), deadline_s=120)
            steps[name].append(ranks[0]["step_s"])
            memory[name] = max(rank["pss_mb"] for rank in ranks)
    for name in ("dp2", "tp2", "pp2", "d3"):
        figures[f"{name}_vs_one"] = statistics.median(
            one / this for one, this in zip(steps["one"], steps[name], strict=True)
        )
    figures |= {f"{name}_step_ms": 1e3 * statistics.median(times) for name, times in steps.items()}
    figures["d3_pss_mb_max"] = memory["d3"]
    context = {
        "model": MODEL, "tokens_per_step": SEQ * SEQUENCES, "cores": os.cpu_count(), "pairs": PAIRS,
        "rounds": ROUNDS, "torch": torch.__version__, "load_1min": os.getloadavg()[0],
        "threads": "one: 2; ranks of the other layouts, and both sides of vs_huggingface: 1",
    }  # fmt: skip
    for name, value in figures.items():
        print(f"{name:26} {value:10.3f}")
    rounded = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"bench": "trainer", "figures": rounded, "context": context}))


if __name__ == "__main__":
    main()
