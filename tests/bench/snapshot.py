"""What a snapshot in memory costs its rank, and what its copy to the buddy costs the machine.

    .venv/bin/python tests/bench/snapshot.py

The state is that of one rank of the demo's model at 2x2x2; the peer is a plain copy of the same tensor into
memory that was used before. Copies take turns, so that a busy machine is busy for both, and rotate over as
many targets as snapshots do. The last line is one JSON object: ratios are ours over the peer's; shares are of
a step of 200 ms, on two cores where eight ranks run.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import carriers
from carriers import Node, agree, nodes, protect
from keepstep.llama.parity import EVERY, sum_of
from keepstep.session.slots import Slots

STATE = 3 * 427_008  # fp32 elements: the owned half of 854,016 parameters and both moments
LARGE = 64 << 20
ROUNDS, FRESH = 300, 25
STEP_S, RANKS, CORES = 0.2, 8, 2


class Rank:
    """The trainer's copy, with its parts timed."""

    def __init__(self, node: Node, rank: int, elements: int) -> None:
        carriers.PAYLOAD = 4 * elements
        self.slots: Slots = node.slots(rank, world=64, attempt=1)
        numbers = range(self.slots.shape.slots)
        self.targets = [torch.frombuffer(self.slots.payload(k), dtype=torch.float32) for k in numbers]
        self.state = torch.randn(elements)
        self.step = 0

    def take(self) -> tuple[float, float]:
        """Seconds of the copy, and of the whole stall."""
        self.step += 1
        agree(self.slots)
        began = time.perf_counter()
        number = self.slots.begin(self.step)
        assert number is not None
        copying = time.perf_counter()
        self.targets[number].copy_(self.state)
        copied = time.perf_counter()
        self.slots.finish(b"{}", self.state.numel() * 4)
        return copied - copying, time.perf_counter() - began


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_s(node: Node) -> float:
    fields = Path(f"/proc/{node.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stalls(node: Node) -> dict[str, float]:
    """Of a rank without a buddy: its own time only. The first copy of an attempt is looked at by itself."""
    rank = Rank(node, 0, STATE)
    steady = in_turn([rank] * ROUNDS)
    first = in_turn([Rank(node, 1 + k, STATE) for k in range(FRESH)])
    memcpy_s, copy_s, whole_s = (max(pair) for pair in zip(steady, first, strict=True))
    return {
        "stall_vs_memcpy": max(steady[1] / steady[0], first[1] / first[0]),
        "stall_checksummed_vs_memcpy": max(steady[2] / steady[0], first[2] / first[0]),
        "memcpy_ms": 1e3 * memcpy_s,
        "copy_ms": 1e3 * copy_s,
        "stall_ms": 1e3 * whole_s,
        "stall_share": whole_s / STEP_S,
        "stall_cpu_share": RANKS * whole_s / (CORES * STEP_S),
    }


def in_turn(ranks: list[Rank]) -> tuple[float, float, float]:
    """Medians: a plain copy, the copy into a slot, the whole stall."""
    count = len(ranks[0].targets)
    buffers = [torch.zeros(STATE) for _ in range(count)]
    plain, copies, wholes = [], [], []
    for k, rank in enumerate(ranks):
        plain.append(seconds(lambda k=k, rank=rank: buffers[k % count].copy_(rank.state)))  # type: ignore[misc]
        copied, whole = rank.take()
        copies.append(copied)
        wholes.append(whole)
    return statistics.median(plain), statistics.median(copies), statistics.median(wholes)


def to_the_buddy(pair: list[Node]) -> dict[str, float]:
    """Both carriers' processor time, the receiver's checksum included."""
    a, _ = pair
    rank = Rank(a, 0, LARGE // 4)
    rank.take()
    protect(rank.slots, step=rank.step)  # both files are there now
    before = sum(map(cpu_s, pair))
    took = []
    for _ in range(10):
        began = time.perf_counter()
        rank.take()
        protect(rank.slots, step=rank.step)
        took.append(time.perf_counter() - began)
    spent_s = (sum(map(cpu_s, pair)) - before) / len(took)
    per_byte_s = spent_s / LARGE
    return {
        "buddy_gb_per_s": LARGE / statistics.median(took) / 1e9,
        "buddy_cpu_s_per_gb": per_byte_s * 1e9,
        "buddy_cpu_share": RANKS * STATE * 4 * per_byte_s / (CORES * STEP_S),
    }


def parity() -> dict[str, float]:
    """Summing the bits of state and weights after one update and before the next, every so many steps."""
    state, weights = torch.randn(STATE), torch.randn(2 * STATE // 3)
    took = [seconds(lambda: torch.stack([sum_of(part) for part in (state, weights)])) for _ in range(ROUNDS)]
    return {"parity_share": 2 * statistics.median(took) / (EVERY * STEP_S)}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="keepstep-bench-") as folder:
        with nodes(Path(folder) / "one", "a") as (alone,):
            figures = stalls(alone)
        with nodes(Path(folder) / "two", "a", "b") as pair:
            figures |= to_the_buddy(pair)
    figures |= parity()
    rounded = {name: round(value, 4) for name, value in figures.items()}
    context = {"load": round(os.getloadavg()[0], 1), "state_mb": round(4 * STATE / 1e6, 1)}
    print(json.dumps({"bench": "snapshot", "figures": rounded, "context": context}))


if __name__ == "__main__":
    main()
