"""The built-in trainer against Hugging Face's Llama in one process, torchtitan, and itself in one process.

    .venv/bin/python tests/bench/trainer.py

Same model, same batch, same threads; pairs are interleaved, so that a busy machine is busy for both. The last
line is one JSON object; ratios are ours over theirs in tokens per second: above 1 is faster.

`exposed_LAYOUT_DIMENSION` is the share of a step for which ranks, on average, waited for that dimension:
data and gradients along dp, activations along tp, keys and values along cp; along pp messages and the bubble.
Beside it stand the phases of one process, waiting left out. Held activations are those of a layer of 8b.
"""

import json
import mmap
import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # two spinning threads on a machine that others use stand still
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from in_turn import step_seconds, train_in_turn
from keepstep.core.beacon import PAGE
from keepstep.core.footprint import activation_bytes, footprint
from keepstep.llama import parallel
from keepstep.llama.data import Batch
from keepstep.llama.initial import initialise
from keepstep.llama.job import TrainJob
from keepstep.llama.numerics import RECOMPUTATIONS, Numerics
from keepstep.llama.trainer import Trainer
from keepstep.session import Phase, Session, current
from keepstep.spec.presets import PRESETS
from rank_gang import run_gang

SEQ, SEQUENCES = 256, 4
MODEL = {
    "layers": 4, "dim": 256, "ffn_dim": 768, "heads": 8, "kv_heads": 4, "vocabulary": 260, "max_seq": 2048
}  # fmt: skip
PAIRS, ROUNDS, STEPS = 15, 5, 12
PHASES = ("data", "forward", "backward", "optimizer")
# dp, pp, cp, tp, chunks
LAYOUTS = {
    "one": (1, 1, 1, 1, 1), "dp2": (2, 1, 1, 1, 1), "pp2": (1, 2, 1, 1, 1), "ilv2": (1, 2, 1, 1, 2),
    "cp2": (1, 1, 2, 1, 1), "tp2": (1, 1, 1, 2, 1), "d3": (2, 2, 1, 2, 1),
}  # fmt: skip
Sizes = tuple[int, int, int, int, int]
TORCHTITAN = (
    str(Path(sys.prefix) / "torchtitan" / "bin" / "python"),
    str(Path(__file__).parent / "scripts" / "torchtitan_gang.py"),
)
# Its libraries start threads otherwise, and a process with threads must not be forked.
ONE_THREAD = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"
}  # fmt: skip


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


class Clock(Session):
    """Adds up what it is told: seconds by phase without waiting, and of waiting by dimension."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._at, self._in, self._for = time.perf_counter(), "", ""
        page, rank = mmap.mmap(-1, PAGE), int(os.environ.get("RANK", "0"))
        super().__init__(page, rank=rank, world_size=int(os.environ.get("WORLD_SIZE", "1")), attached=False)

    def _add(self) -> None:
        now = time.perf_counter()
        self.spent[self._for or self._in] += now - self._at
        self._at = now

    def phase(self, phase: Phase, micro_batch: int = 0) -> None:
        self._add()
        self._in, self._for = phase.name.lower(), ""
        super().phase(phase, micro_batch)

    def wait(self, group: str = "", sequence: int = 0, peer: int = -1) -> None:
        self._add()
        self._for = f"exposed_{group}"
        super().wait(group, sequence, peer)

    def go_on(self) -> None:
        self._add()
        self._for = ""
        super().go_on()


def trainer(layout: Sizes, micro_batch: int, session: Session | None = None) -> Trainer:
    dp, pp, cp, tp, chunks = layout
    job = TrainJob.parse(
        {
            "job": "bench",
            "layout": {"dp": dp, "pp": pp, "cp": cp, "tp": tp},
            "pipeline": {"schedule": "interleaved" if chunks > 1 else "1f1b", "chunks": chunks},
            "model": MODEL,
            "steps": 10_000,
            "batch": {"global_tokens": SEQ * SEQUENCES, "seq": SEQ, "micro_batch": micro_batch},
            "timeout_s": 60,
        }
    )
    device = torch.device("cpu")
    groups = parallel.join(job.layout, device, timeout_s=60)
    ours = Trainer(job, groups, Noise(), device=device, session=session or current())
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

    ours = trainer(LAYOUTS["one"], SEQUENCES)
    for _ in range(3):
        seconds(theirs), seconds(ours.step)
    pairs = [(seconds(theirs), seconds(ours.step)) for _ in range(PAIRS)]
    tokens = SEQ * SEQUENCES
    return {
        "vs_huggingface": statistics.median(a / b for a, b in pairs),
        "tokens_per_s": tokens / statistics.median(b for _, b in pairs),
        "huggingface_tokens_per_s": tokens / statistics.median(a for a, _ in pairs),
    }


def in_turn() -> None:
    """A rank of ours at 2 x 2 x 2."""
    ours = trainer(LAYOUTS["d3"], 1)
    train_in_turn(ours.step)
    parallel.leave()


def against_torchtitan() -> dict[str, float]:
    if not Path(TORCHTITAN[0]).exists():
        print("torchtitan is not installed: make .venv/.torchtitan")
        return {}
    theirs, ours = step_seconds([TORCHTITAN, (sys.executable, __file__, "in-turn")], ONE_THREAD)
    tokens = SEQ * SEQUENCES
    return {
        "vs_torchtitan": statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
        "d3_tokens_per_s": tokens / statistics.median(ours),
        "torchtitan_tokens_per_s": tokens / statistics.median(theirs),
    }


def of_layout(layout: Sizes) -> dict[str, float]:
    """On each rank: seconds of a step, shares of it by phase and of waiting, and its share of memory."""
    if layout == LAYOUTS["one"]:
        torch.set_num_threads(2)
    clock = Clock()
    ours = trainer(layout, 1, clock)
    for _ in range(3):
        ours.step()
    clock.phase(Phase.UNKNOWN)
    clock.spent.clear()
    times = [seconds(ours.step) for _ in range(STEPS)]
    step_s = statistics.median(times)
    clock.phase(Phase.UNKNOWN)
    shares = {name: spent / sum(times) for name, spent in clock.spent.items()}
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    pss = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) / 1e3
    parallel.leave()
    return {"step_s": step_s, "pss_mb": pss, **shares}


def at_scale() -> dict[str, float]:
    """GB of a layer of 8b and of a rank of 405b, by formulas that tests compare with autograd and buffers."""
    figures = {}
    for recompute in RECOMPUTATIONS:
        of_8b = preset("8b", {}, 1).shape
        figures[f"8b_layer_{recompute}_gb"] = activation_bytes(of_8b, 8192, recompute) / 1e9
        job = preset("405b", {"tp": 8, "pp": 16, "dp": 128}, 2048)
        job = replace(job, numerics=Numerics(recompute=recompute))
        found = footprint(job.shape, job.layout, 0, job.training(element=2, cuda=True))
        figures[f"405b_rank0_{recompute}_gb"] = found.total / 1e9
    parts = {f"405b_rank0_{name}_gb": size / 1e9 for name, size in asdict(found).items()}
    return figures | {name: size for name, size in parts.items() if "activations" not in name}


def preset(name: str, layout: dict[str, int], sequences: int) -> TrainJob:
    shape = PRESETS[name].shape
    model = {field: getattr(shape, field) for field in MODEL}
    batch = {"global_tokens": 8192 * sequences, "seq": 8192}
    return TrainJob.parse({"job": "x", "layout": layout, "model": model, "steps": 1, "batch": batch})


def main() -> None:
    figures: dict[str, float] = run_gang(1, against_hugging_face, deadline_s=300)[0]
    figures |= against_torchtitan()
    steps: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    memory: dict[str, float] = {}
    shares: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for name, layout in LAYOUTS.items():
            ranks = run_gang(int(np.prod(layout[:4])), partial(of_layout, layout), deadline_s=120)
            steps[name].append(ranks[0]["step_s"])
            memory[name] = max(rank["pss_mb"] for rank in ranks)
            for part in {part for rank in ranks for part in rank}:
                if part.startswith("exposed") or (name == "one" and part in PHASES):
                    place = part.replace("exposed", f"exposed_{name}")
                    shares[place].append(statistics.fmean(rank.get(part, 0.0) for rank in ranks))
    for name in LAYOUTS.keys() - {"one"}:
        figures[f"{name}_vs_one"] = statistics.median(
            one / this for one, this in zip(steps["one"], steps[name], strict=True)
        )
    figures |= {f"{name}_step_ms": 1e3 * statistics.median(times) for name, times in steps.items()}
    figures["d3_pss_mb_max"] = memory["d3"]
    figures |= {name: statistics.median(found) for name, found in sorted(shares.items())}
    figures |= at_scale()
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
    if sys.argv[1:] == ["in-turn"]:
        run_gang(8, in_turn, deadline_s=600)
    else:
        main()
