"""What is shown: a job that is hit three times, and the same job left alone."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from keepstep.cli import units
from keepstep.cli.client import Json, ref
from keepstep.cli.demo.faults import kill_in_phase, lose_node, pss_bytes
from keepstep.cli.demo.figures import Comparison, Figures, compare, curve_of
from keepstep.cli.demo.stage import NODES, SLOTS, Stage
from keepstep.cli.goodput import one_line
from keepstep.core.beacon import Phase
from keepstep.core.clock import SystemClock
from keepstep.core.errors import JobFailed, TimedOut
from keepstep.core.states import JOB

SPEC = """
name: llama3-demo
resources: {nodes: 2, gpus_per_node: 4, spares: 1}
parallelism: {tp: 2, pp: 2, dp: 2}
run:
  llama:
    model: debug
    data: {source: stdlib}
    batch: {global_tokens: 1024, seq: 256}
"""
_FINAL = frozenset(str(state) for state in JOB.final)
_POLL_S = 0.1
_STEP_WITHIN_S = 90.0  # to the first step, and from one to the next
_RECOVERED_WITHIN_S = 60.0
_SHOW_EVERY = 20  # steps
_MEMORY_EVERY_S = 3.0


@dataclass(slots=True, kw_only=True)
class Watched:
    """A job that is followed: its newest state, and how much memory its ranks had at most."""

    stage: Stage
    job: str
    pss_max_bytes: int = 0
    told: Json = field(default_factory=dict)
    _shown: int = 0
    _measure_at: float = 0.0

    @property
    def step(self) -> int:
        return int((self.told.get("progress") or {}).get("step") or 0)

    def look(self) -> None:
        """Read the job and say how far it is. Errors: JobFailed."""
        self.told = self.stage.job(self.job)
        progress = self.told["progress"]
        if self.step >= self._shown + _SHOW_EVERY and progress.get("loss") is not None:
            self._shown = self.step - self.step % _SHOW_EVERY
            speed = units.count(progress.get("tokens_per_s"))
            say(f"  step {self.step:>3}  loss {progress['loss']:.3f}   {speed} tokens/s")
        now = SystemClock().monotonic()
        if now >= self._measure_at:
            self._measure_at = now + _MEMORY_EVERY_S
            pids = [rank["pid"] for rank in self.stage.ranks(self.job).values() if rank["state"] == "running"]
            self.pss_max_bytes = max(self.pss_max_bytes, sum(map(pss_bytes, pids)))
        if self.told["state"] in _FINAL - {"succeeded"}:
            raise JobFailed(f"the demo's job {self.told['state']}", why=str(self.told["reason"]))

    def until(self, reached: Callable[[], bool], what: str, *, within_s: float) -> None:
        """Look until it is so. The time begins anew with every step. Errors: TimedOut."""
        clock = SystemClock()
        step, deadline = -1, clock.monotonic() + within_s
        while True:
            self.look()
            if reached():
                return
            if self.step > step:
                step, deadline = self.step, clock.monotonic() + within_s
            if clock.monotonic() > deadline:
                raise TimedOut(f"the job is {self.told['state']}, not {what}, after {within_s:g} s",
                               why=str(self.told["reason"]))  # fmt: skip
            time.sleep(_POLL_S)

    def until_step(self, step: int) -> None:
        """Until this attempt has stepped and the job is past `step`."""
        self.until(
            lambda: (
                self.told["state"] == "succeeded" or (self.told["state"] == "running" and self.step >= step)
            ),
            f"at step {step}",
            within_s=_STEP_WITHIN_S,
        )


def say(text: str) -> None:
    print(text)
    sys.stdout.flush()


def tell(stage: Stage, *, steps: int) -> Figures:
    """Run both jobs and say what happens. Errors: what the jobs come to, if not to their end."""
    clock = SystemClock()
    address = stage.running.url.removeprefix("http://")
    say(f"✓ controller up (SQLite, {address}), {NODES} local nodes x {SLOTS} slots")
    disturbed = _submit(stage, steps, "disturbed")
    faults: tuple[Callable[[], int], ...] = (
        lambda: _kill(disturbed, rank=3, phase=Phase.BACKWARD, after=int(0.3 * steps)),
        lambda: _kill(disturbed, rank=5, phase=Phase.OPTIMIZER, after=int(0.55 * steps)),
        lambda: _lose(disturbed, after=int(0.75 * steps)),
    )
    replayed = recovered = 0
    for number, fault in enumerate(faults, 1):
        step = fault()
        incident = _recovery(disturbed, number)
        if incident is not None:
            recovered += 1
            replayed += _explain(incident, step)
    disturbed.until(lambda: disturbed.told["state"] == "succeeded", "finished", within_s=_STEP_WITHIN_S)
    ledger = stage.client.get(f"/jobs/{ref(disturbed.job)}/goodput")

    say(f"✓ {steps} steps done; now the same job once more, undisturbed")
    reference = _submit(stage, steps, "undisturbed")
    reference.until(lambda: reference.told["state"] == "succeeded", "finished", within_s=_STEP_WITHIN_S)
    curves = [curve_of(stage.points(watched.job)) for watched in (disturbed, reference)]
    comparison = compare(*curves, steps=steps)
    _say_comparison(comparison, steps)
    standby_s = ledger["buckets"].get("standby", 0.0) / SLOTS
    spare = f"   (eight slots; spares stood by for {standby_s:.1f} s)" if standby_s else ""
    say(one_line(ledger, 8) + spare)
    say("next: run your own script: keepstep run --nproc 2 train.py")
    return Figures(
        injected=len(faults),
        recovered=recovered,
        loss=comparison,
        goodput=round(float(ledger["goodput"] or 0.0), 4),
        steps=steps,
        steps_replayed=replayed,
        wall_s=round(clock.monotonic() - stage.began_s, 1),
        ranks_pss_max_bytes=max(disturbed.pss_max_bytes, reference.pss_max_bytes),
    )


def _submit(stage: Stage, steps: int, name: str) -> Watched:
    from keepstep.spec import check, to_dict

    folder = stage.home.path / "checkpoints"
    changes = [f"run.llama.steps={steps}", f"checkpoint.dir={folder}", "checkpoint.every=10 steps"]
    checked = check(SPEC, "demo", changes)
    job = stage.client.post("/jobs", {"spec": to_dict(checked.spec), "source": {"file": "keepstep demo"}})
    watched = Watched(stage=stage, job=str(job["id"]))
    watched.until(lambda: watched.told["state"] == "running", "running", within_s=_STEP_WITHIN_S)
    if name == "disturbed":
        attempt = watched.told["attempt"]
        spares = ", ".join(attempt.get("spares") or []) or "none"
        say(
            f"✓ llama3 debug model, {(checked.parameters or 0) / 1e6:.1f} M parameters, "
            f"{checked.spec.parallelism} on nodes {', '.join(attempt['nodes'])}; standing by: {spares}"
        )
        say("  data: this Python's own standard library, masked at document boundaries")
    return watched


def _kill(job: Watched, *, rank: int, phase: Phase, after: int) -> int:
    """Kill a rank in the middle of a phase; the step it was in."""
    job.until_step(after)
    victim = job.stage.ranks(job.job)[rank]
    step = kill_in_phase(int(victim["pid"]), phase, after_step=after, within_s=_STEP_WITHIN_S)
    where = {Phase.BACKWARD: "backward pass", Phase.OPTIMIZER: "optimizer's part"}.get(
        phase, phase.name.lower()
    )
    say(f"⚡ kill -9 rank {rank} ({victim['role']}, node {victim['node']}) in the {where} of step {step}")
    return step


def _lose(job: Watched, *, after: int) -> int:
    """Lose the node that holds rank 0; the step that the job was in."""
    job.until_step(after)
    node = str(job.stage.ranks(job.job)[0]["node"])
    step = job.step + 1
    lose_node(job.stage.node_folder(node))
    say(f"⚡ lose node {node} (agent and all its ranks) in step {step}")
    return step


def _recovery(job: Watched, number: int) -> Json | None:
    """The newest incident once it is over, when there have been at least `number`; None if it never is."""
    found: list[Json] = []

    def over() -> bool:
        found[:] = job.stage.client.get(f"/jobs/{ref(job.job)}/incidents")["incidents"]
        return len(found) >= number and all(one["state"] in ("recovered", "closed") for one in found)

    try:
        job.until(over, "recovered", within_s=_RECOVERED_WITHIN_S)
    except TimedOut as error:
        say(f"  not recovered: {error}")
        return None
    newest: Json = job.stage.client.get(f"/incidents/{found[0]['id']}")
    return newest if newest["state"] == "recovered" else None


def _explain(incident: Json, step: int) -> int:
    """Three lines: noticed, decided, training again; the number of steps that are done twice."""
    seconds, attempt = incident["seconds"], incident["next_attempt"] or {}
    decision = incident["decision"] or {}
    from_step = int(attempt.get("parent_step") or 0)
    replayed = max(0, step - 1 - from_step)
    rejected = "; ".join(f"{option['option']}: {option['why']}" for option in decision.get("rejected") or [])
    _moment("detected", seconds["detected"], str(incident["evidence"]["what"]))
    _moment(
        "decided",
        seconds["decided"],
        str(decision.get("reason")) + (f"\n{' ' * 24}rejected {rejected}" if rejected else ""),
    )
    _moment(
        "training",
        seconds["recovered"],
        f"from step {from_step}, attempt {attempt.get('number')}; steps replayed {replayed}",
    )
    return replayed


def _moment(name: str, after_s: float | None, text: str) -> None:
    shown = "-" if after_s is None else f"+{after_s:.2f} s"
    say(f"    {name:<9} {shown:<9} {text}")


def _say_comparison(found: Comparison, steps: int) -> None:
    compared = f"{steps - len(found.missing)} steps"
    lost = f"; the record of step {', '.join(map(str, found.missing))} is lost" if found.missing else ""
    if found.equal:
        equal = f"loss curve equal to an undisturbed run's (max difference {found.max_abs})"
        say(f"✓ {compared}; {equal}{lost}")
    elif found.max_abs is None:
        say(f"✗ the two loss curves cannot be compared{lost}")
    else:
        differs = f"loss curve differs from an undisturbed run's by up to {found.max_abs:g}"
        say(f"✗ {compared}; {differs}{lost}")
