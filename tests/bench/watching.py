"""What being watched costs a rank: a mark, the marks of a step, and a step with and without them.

    .venv/bin/python tests/bench/watching.py

The model is the demo's (3.3 M parameters, 1,024 tokens a step on one thread): Hugging Face's Llama as an
unchanged script under the hook, and the built-in trainer with its session. Costs are CPU time, since a busy
machine takes turns away from everybody. The last line is one JSON object.
"""

import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.utils.data import DataLoader

from bench.trainer import MODEL, SEQ, SEQUENCES, trainer
from keepstep.agent.hook import keepstep_marks
from keepstep.core import beacon
from keepstep.session import Phase, Session, current
from rank_gang import run_gang

PAIRS, STEPS, CALLS, TIMES = 8, 2, 20_000, 15


def cost_us(call: Callable[[], object]) -> float:
    """CPU time of one call, the best of several rounds: what disturbs a round only adds to it."""
    took = []
    for _ in range(TIMES):
        began = time.process_time_ns()
        for _ in range(CALLS):
            call()
        took.append((time.process_time_ns() - began) / CALLS / 1e3)
    return min(took)


def marks() -> dict[str, float]:
    """A region of the hook is two marks, its beginning and its end; a phase of a session is one."""
    writer = beacon.BeaconWriter(mmap.mmap(-1, beacon.PAGE), rank=0, world_size=1)
    hook = keepstep_marks.Marks(writer, Phase, torch.compiler.is_compiling, print)
    session = Session(mmap.mmap(-1, beacon.PAGE), rank=0, world_size=1, attached=True)

    def nothing() -> None:
        pass

    region = keepstep_marks._region(hook, int(Phase.BACKWARD), nothing)
    bare = cost_us(nothing)
    return {
        "hook": (cost_us(region) - bare) / 2,
        "session": cost_us(lambda: session.phase(Phase.FORWARD)) - bare,
    }


def script() -> dict[str, Any]:
    """An unchanged training loop under the hook: marks of a step, and steps without and with them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    page = mmap.mmap(-1, beacon.PAGE)
    hook = keepstep_marks.attach(torch, beacon, page, print)
    config = LlamaConfig(
        hidden_size=MODEL["dim"], intermediate_size=MODEL["ffn_dim"], num_hidden_layers=MODEL["layers"],
        num_attention_heads=MODEL["heads"], num_key_value_heads=MODEL["kv_heads"],
        vocab_size=MODEL["vocabulary"], max_position_embeddings=MODEL["max_seq"], use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, MODEL["vocabulary"], (SEQUENCES * STEPS * (2 * PAIRS + 2), SEQ))
    batches = iter(DataLoader(tokens, batch_size=SEQUENCES))  # type: ignore[arg-type]

    def steps() -> float:
        began = time.process_time()
        for _ in range(STEPS):
            batch = next(batches)
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.process_time() - began) / STEPS

    steps()
    before = sequence_of(page)
    steps()
    per_step = (sequence_of(page) - before) / STEPS
    pairs = []
    for _ in range(PAIRS):
        hook.active = False
        without = steps()
        hook.active = True
        pairs.append((without, steps()))
    return {
        "marks": per_step,
        "step_s": statistics.median(without for without, _ in pairs),
        "with_over_without": statistics.median(with_ / without for without, with_ in pairs),
    }


def sequence_of(page: mmap.mmap) -> int:
    """Every mark moves it."""
    record = beacon.BeaconReader(page).read()
    assert record is not None
    return record.sequence


def built_in() -> dict[str, Any]:
    """The built-in trainer, which marks by itself; its page is one that nobody reads."""
    ours = trainer((1, 1, 1, 1, 1), 1)
    page = current()._writer._page
    ours.step()
    before, began = sequence_of(page), time.process_time()
    for _ in range(STEPS):
        ours.step()
    step_s = (time.process_time() - began) / STEPS
    return {"marks": (sequence_of(page) - before) / STEPS, "step_s": step_s}


def main() -> None:
    one = marks()
    unchanged, trained = run_gang(1, script, deadline_s=600.0)[0], run_gang(1, built_in, deadline_s=600.0)[0]
    shares = [
        unchanged["marks"] * one["hook"] / 1e6 / unchanged["step_s"],
        trained["marks"] * one["session"] / 1e6 / trained["step_s"],
    ]
    figures = {
        "mark_us": max(one.values()),
        "step_share": max(shares),
        "hook_mark_us": one["hook"],
        "session_mark_us": one["session"],
        "marks_a_step_unchanged": unchanged["marks"],
        "marks_a_step_built_in": trained["marks"],
        "step_with_over_without": unchanged["with_over_without"],
    }
    rounded = {name: float(f"{value:.3g}") for name, value in figures.items()}
    context = {"load": round(os.getloadavg()[0], 1), "torch": torch.__version__}
    print(json.dumps({"bench": "watching", "figures": rounded, "context": context}))


if __name__ == "__main__":
    main()
