"""Healthy histories that nobody may be killed for, and hangs that must be found, judged as in production.

Each history is a gang of two ranks over 10,000 steps or more: noisy, drifting and bimodal, with evaluations,
checkpoints, recompilations, data stalls, links that flap and machines that pause. Every now and then an agent
is not heard for up to 14 s while its rank goes on, through evaluations and checkpoints, too (from 15 s on a
gang that stands is given up, whatever is usual). Histories are drawn by a generator that knows nothing of the
judge; its seed is the commit's hash. Time is virtual: the judge is only asked where something stands still
for longer than a second and a half (beside a silent node: three), at the looks that an agent would have made,
with the beacons' histograms as they were at that moment.

So are recordings of real runs (tests/recorded.py).

The last line is one JSON object: `kills` of healthy gangs over `histories`, and how long hangs took to be
found as a multiple of the bound that the verdict names.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import recorded
from histories import STEPS, History, Silence, Stall, history
from keepstep.core.beacon import BINS, bin_edge_s
from keepstep.core.durations import Usual
from keepstep.core.ids import Attempt, JobId, Node, Rank
from keepstep.core.job import Batch, Checkpoint, JobSpec, LlamaRun, ModelShape, Optimizer, Resources
from keepstep.core.layout import Layout
from keepstep.core.states import AttemptState, JobState
from keepstep.decide.hung import Suspicion, hung
from keepstep.decide.judge import judge
from keepstep.decide.plan import Policy, Verdict
from keepstep.decide.view import (
    AttemptView,
    Examined,
    Finding,
    JobView,
    NodeView,
    PartPhase,
    PartView,
    RankPhase,
    RankView,
)

LOOK_S = 0.25
PLANNED = ("none", "evaluation", "checkpoint")  # stalls that are the script's own doing, and no fault
COMPILING = ("torch/_inductor/codecache.py:1 compile", "train.py:1 forward")
COMPUTING = ("train.py:1 forward",)

EDGES = np.array([bin_edge_s(k) for k in range(BINS - 1)])
SPEC = JobSpec(
    name="j",
    resources=Resources(nodes=2, gpus_per_node=1),
    parallelism=Layout(dp=2),
    run=LlamaRun(
        model=ModelShape(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocabulary=260),
        steps=STEPS,
        batch=Batch(global_tokens=512, seq=256),
        optimizer=Optimizer(lr=1e-3, min_lr=1e-4, warmup_steps=10),
    ),
    checkpoint=Checkpoint(dir=None),
)
POLICY = Policy()


class Beacons:
    """What both ranks' pages hold after so many steps."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.counted: dict[str, int] = {}
        self.bins: dict[str, np.ndarray] = {}
        self.longest: dict[str, float] = {}

    def usual(self, phase: str, step: int) -> Usual:
        seconds = self.history.phases.get(phase)
        if seconds is not None:
            self.add(phase, seconds[self.counted.get(phase, 0) : step])
            self.counted[phase] = step
        bins = self.bins.get(phase, np.zeros(BINS, dtype=np.int64)) * 2
        return Usual(
            count=int(bins.sum()),
            origins=2,
            longest_s=self.longest.get(phase, 0.0),
            bins=tuple(bins.tolist()),
        )

    def add(self, phase: str, seconds: np.ndarray) -> None:
        found = np.bincount(np.searchsorted(EDGES, seconds, side="right"), minlength=BINS)
        self.bins[phase] = found + self.bins.get(phase, 0)
        self.longest[phase] = max(self.longest.get(phase, 0.0), float(seconds.max(initial=0.0)))


def standing(stall: Stall, usual: Usual, still_s: float, step_s: float) -> tuple[JobView, AttemptView]:
    """The gang at one look: rank 0 waits for rank 1."""
    culprit = RankView(
        rank=Rank(1), phase=RankPhase.RUNNING, step=stall.step, doing=stall.phase, process="running",
        still_s=still_s, counter=9, group="dp", group_sequence=9 if stall.kind == "link" else 8,
        waiting_s=still_s if stall.kind == "link" else None,
    )  # fmt: skip
    waiting = replace(culprit, rank=Rank(0), group="dp", group_sequence=9, waiting_s=still_s)
    parts = tuple(
        PartView(node=Node(name), phase=PartPhase.RUNNING, heard=True, alive=1, ranks=(rank,))
        for name, rank in (("a", waiting), ("b", culprit))
    )
    attempt = AttemptView(
        number=Attempt(1), state=AttemptState.RUNNING, layout=SPEC.parallelism, parts=parts, step=stall.step,
        step_age_s=still_s, progress_age_s=still_s, stepped=True, step_every_s=max(step_s, 1.0),
    )  # fmt: skip
    job = JobView(
        id=JobId("j"),
        spec=SPEC,
        state=JobState.RUNNING,
        attempt=attempt,
        attempts=1,
        usual={stall.phase: usual},
    )
    return job, attempt


def judged(stall: Stall, usual: Usual, still_s: float, step_s: float) -> Verdict | None:
    """The verdict at one look, after as many close looks as the judge asks for."""
    job, attempt = standing(stall, usual, still_s, step_s)
    found = hung(job, attempt, POLICY)
    if isinstance(found, Suspicion):
        stack = COMPILING if stall.kind == "compile" else COMPUTING
        look = Examined(
            attempt=Attempt(1), age_s=0.0, findings=(Finding(rank=Rank(1), process="running", stack=stack),)
        )
        found = hung(replace(job, examined=(look, look)), attempt, POLICY)
    return found if isinstance(found, Verdict) else None


def given_up(stall: Stall, usual: Usual, still_s: float, silence_s: float, step_s: float) -> bool:
    """Whether the other node is taken to be the reason, because it is silent as well."""
    job, attempt = standing(stall, usual, still_s, step_s)
    first, second = attempt.parts
    unheard = replace(second, heard=False, ranks=(replace(second.ranks[0], still_s=None),))
    there = {
        first.node: NodeView(name=first.node, pool="p", slots=1),
        second.node: NodeView(name=second.node, pool="p", slots=1, connected=False, silence_s=silence_s),
    }
    attempt = replace(attempt, parts=(first, unheard))
    found = judge(replace(job, attempt=attempt), attempt, there, POLICY, returned=True)
    return isinstance(found, Verdict) and found.kind == "silent"


def lived(one: History) -> tuple[int, list[float]]:
    """Healthy moments that were taken for hangs; and for hangs the time to find them over the bound."""
    step_s = float(sum(seconds[:100].mean() for seconds in one.phases.values()))
    kills, ratios = sum(unheard(one, silence, step_s) for silence in one.silences), []
    beacons = Beacons(history=one)
    for stall in sorted((*one.stalls, *_long_phases(one)), key=lambda each: each.step):
        usual = beacons.usual(stall.phase, stall.step)
        if stall.hang:
            ratios.append(found_after(stall, usual, step_s))
            break
        # Of a pause a look after it counts for half a second at most; else the last look before it moved.
        last_look_s = 0.5 if stall.kind == "pause" else LOOK_S * int(stall.seconds / LOOK_S)
        kills += judged(stall, usual, last_look_s, step_s) is not None
        if not stall.usual and stall.kind != "pause":
            beacons.add(stall.phase, np.array([stall.seconds]))
    return kills, ratios


def unheard(one: History, silence: Silence, step_s: float) -> int:
    """Waits that were taken for the silent node's fault; each is looked at just before it ends."""
    kills, at_s = 0, 0.0
    beacons = Beacons(history=one)
    planned = {stall.step: stall for stall in one.stalls if stall.phase in PLANNED}
    for stall in (stall for stall in planned.values() if stall.step < silence.step):
        beacons.add(stall.phase, np.array([stall.seconds]))
    for step in range(silence.step, STEPS):
        if at_s > silence.seconds:
            break
        waits = [(name, float(of[step])) for name, of in one.phases.items()]
        if step in planned:
            waits.append((planned[step].phase, planned[step].seconds))
        for phase, seconds in waits:
            still_s = LOOK_S * int(min(seconds, silence.seconds - at_s) / LOOK_S)
            if still_s >= POLICY.silent_after_s:
                wait, usual = Stall(step=step, phase=phase, seconds=seconds), beacons.usual(phase, step)
                kills += given_up(wait, usual, still_s, at_s + still_s, step_s)
            at_s += seconds
    return kills


def _long_phases(one: History) -> Iterator[Stall]:
    """Completions that stand out from what was before; the rest lies far below any bound."""
    for name, seconds in one.phases.items():
        usual = np.minimum(seconds, 4 * np.median(seconds[:200]))
        mean = np.cumsum(usual, dtype=np.float64) / np.arange(1, STEPS + 1)
        for step in np.flatnonzero((seconds >= 1.5) & (seconds > 5 * mean)):
            yield Stall(step=int(step), phase=name, seconds=float(seconds[step]), usual=True)


def found_after(stall: Stall, usual: Usual, step_s: float) -> float:
    """In multiples of the bound that the verdict names: the look, the report and the close look included."""
    low, high = 0, 1 << 14  # looks
    while high - low > 1:
        middle = (low + high) // 2
        if judged(stall, usual, middle * LOOK_S, step_s) is None:
            low = middle
        else:
            high = middle
    verdict = judged(stall, usual, high * LOOK_S, step_s)
    assert verdict is not None and verdict.bound_s is not None and verdict.rank == 1, verdict
    return (high * LOOK_S + LOOK_S + 0.2) / verdict.bound_s


def drawn(task: tuple[int, int, bool]) -> tuple[int, list[float]]:
    """One history, as its number and the seed say, lived through."""
    of, number, hang = task
    return lived(history(np.random.default_rng([of % 2**64, number]), hang=hang))


def seed() -> int:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or "0", 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=10_000)
    parser.add_argument("--hangs", type=int, default=500)
    asked = parser.parse_args()
    began = time.perf_counter()
    of, kills, ratios = seed(), 0, []
    tasks = ((of, number, number >= asked.histories) for number in range(asked.histories + asked.hangs))
    with multiprocessing.Pool() as pool:
        for number, (wrong, found) in enumerate(pool.imap(drawn, tasks, chunksize=20)):
            if wrong:
                print(f"history {number} of seed {of:x}: {wrong} kills")
            kills += wrong
            ratios += found
    played = {path.stem: recorded.spans(path) for path in recorded.recordings()}
    for path in recorded.recordings():
        for at_s, verdict in recorded.kills(path):
            print(f"{path.stem} at {at_s:.1f} s: {verdict.what}; {verdict.noticed}")
            kills += 1
    figures = {
        "kills": kills,
        "histories": asked.histories,
        "recordings": len(played),
        "steps_each": STEPS,
        "hangs": len(ratios),
        "detect_p95_over_bound": round(float(np.percentile(ratios, 95)), 3) if ratios else None,
        "seconds": round(time.perf_counter() - began, 1),
    }
    context = {"seed": f"{of:x}", "recorded": played}
    print(json.dumps({"bench": "false_alarms", "figures": figures, "context": context}))


if __name__ == "__main__":
    main()
