"""Whether a job that failed may start again, and how long it waits first.

    crash loop   the same failure of the job at the same step, `same_failure_max` times without a new step;
                 after the second on one node another one is tried, which tells whether it is the node
    restarts     failures blamed on the job, within its own window; the infrastructure's do not count
    breaker      `no_progress_max` attempts in a row without a new step, whoever is to blame
    back-off     the first restart is immediate; from the second failure without a new step on, exponential.
                 The infrastructure has `unlucky_max` such restarts for nothing: a second kill or a lost node
                 while the job is still coming back is bad luck, and waiting mends nothing

Progress is a step that no attempt completed before. A script that shows no steps makes progress by living.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from keepstep.core.ids import Node
from keepstep.decide.place import count
from keepstep.decide.plan import Policy
from keepstep.decide.view import Failure, JobView

_BEFORE_ALL = -2  # so that the very first failure, even before any step, does not count as a repetition


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """`exhausted` says why the job must not start again; else it may, after `wait_s`."""

    exhausted: str = ""
    exit_code: int | None = None
    wait_s: float = 0.0
    reason: str = ""


def budget(job: JobView, policy: Policy) -> Budget:
    failures = sorted(job.failures, key=lambda failure: -failure.age_s)
    if not failures:
        return Budget()
    newest = failures[-1]
    if newest.attempt != job.attempts:
        return Budget(reason="the last attempt did not fail")
    in_vain = fruitless(failures, policy)
    why = _exhausted(job, failures, in_vain, policy)
    if why:
        quoted = f" Its first error line: {first_line(newest.error)}" if newest.error else ""
        return Budget(exhausted=why + quoted, exit_code=newest.exit_code)
    repeated = len(in_vain)
    if newest.blame != "job":
        repeated = max(0, repeated - policy.unlucky_max)
    if repeated == 0:
        return Budget(reason="the first restart is immediate" if not in_vain else "bad luck needs no wait")
    wait_s = job.spec.recovery.backoff.delay_s(repeated)
    wait_s = min(max(wait_s, policy.backoff_first_s), policy.backoff_max_s)
    return Budget(
        wait_s=wait_s,
        reason=f"{len(in_vain) + 1} failures in a row without a new step: waits {wait_s:g} s before the next",
    )


def fruitless(failures: list[Failure], policy: Policy) -> list[Failure]:
    """The failures at the end, oldest first, whose attempts completed no step that was not done before."""
    record, previous = _BEFORE_ALL, None
    in_vain: list[Failure] = []
    for failure in failures:
        lived = previous is not None and failure.step < 0 and previous.age_s - failure.age_s >= policy.lived_s
        in_vain = [] if failure.step > record or lived else [*in_vain, failure]
        record, previous = max(record, failure.step), failure
    return in_vain


def _exhausted(job: JobView, failures: list[Failure], in_vain: list[Failure], policy: Policy) -> str:
    newest, restarts = failures[-1], job.spec.recovery.restarts
    last_fruitful = failures[len(failures) - len(in_vain) - 1] if len(in_vain) < len(failures) else None
    streak = [last_fruitful, *in_vain] if last_fruitful is not None else list(in_vain)
    if newest.blame == "job":
        same = [
            one
            for one in streak
            if one is not None
            and one.blame == "job"
            and (one.signature, one.step) == (newest.signature, newest.step)
        ]
        if newest.signature and len(same) >= policy.same_failure_max:
            where = f"at step {newest.step}" if newest.step >= 0 else "before its first step"
            times = f"{count(len(same), 'time')} {where} without progress"
            return f"It fails the same way each time: {newest.signature}, {times}{_whose(same)}."
        charged = [one for one in failures if one.blame == "job" and one.age_s <= restarts.per_s]
        if len(charged) > restarts.max:
            return (
                f"{count(len(charged), 'failure')} blamed on the job within {duration(restarts.per_s)}; "
                f"its budget is {count(restarts.max, 'restart')}."
            )
    most = min(policy.no_progress_max, job.spec.recovery.no_progress_max)
    if len(streak) >= most:
        last = newest.signature or f"blamed on the {newest.blame}"
        return f"{count(len(streak), 'attempt')} in a row made no new step; the last one: {last}."
    return ""


def worn_out(job: JobView, policy: Policy) -> frozenset[Node]:
    """Nodes on which the last fruitless failures began too often to be tried again before others."""
    failures = sorted(job.failures, key=lambda failure: -failure.age_s)
    nodes = [failure.node for failure in fruitless(failures, policy) if failure.node is not None]
    return frozenset(node for node in nodes if nodes.count(node) >= policy.in_place_max)


def tried_elsewhere(job: JobView, policy: Policy) -> frozenset[Node]:
    """A node on which the same failure began twice in a row: the next attempt does without it, if it can.

    A swap is an experiment: what fails elsewhere, too, is not the node's fault.
    """
    failures = sorted(job.failures, key=lambda failure: -failure.age_s)
    last = fruitless(failures, policy)[-1:] and failures[-2:]
    if len(last) < 2 or last[0].node is None or not last[0].signature:
        return frozenset()
    same = (last[0].node, last[0].signature) == (last[1].node, last[1].signature)
    return frozenset({last[0].node}) if same else frozenset()


def _whose(same: Sequence[Failure | None]) -> str:
    """What the same failures have in common, and what the nodes that were tried say of it."""
    known = [one for one in same if one is not None and one.node is not None]
    nodes = list(dict.fromkeys(one.node for one in known))
    ranks = {one.rank for one in known}
    if len(known) < 2:
        return ""
    who = f"rank {ranks.pop()} each time" if len(ranks) == 1 and None not in ranks else "not always one rank"
    if len(nodes) > 1:
        return f" ({who}, on {', '.join(str(node) for node in nodes)} alike: it is not the node)"
    return f" ({who}, always on {nodes[0]}; no other node was tried, so it may be the node: 50 % sure)"


def duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else ""
