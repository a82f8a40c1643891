"""Whether a gang that stands still hangs, and since what moment that may be acted on.

Progress is any counter of any rank that moves. There are two thresholds, and a third way that needs none:

    positive evidence   a process that is stopped but not debugged, a zombie or gone, held over two looks
                        while no rank steps; mismatched collectives in two close looks: ended at once
    the learnt bound    of the culprit's phase (core.durations): suspected, looked at closely, and ended only
                        where the job has completed that phase often enough for it to be known
    the unknown bound   hang_after_unknown, for everything else: a first evaluation, a long compilation, a
                        phase without a name. It is said while it runs

`recovery.hang_after` takes the learnt bound's place, and then any phase will do: its owner said so. Where the
culprit is one of several, the most patient of their bounds holds. A debugged rank stops every clock.

What a script does is only known by its stack: where nobody can read it, a script's own phase names are not
enough to act on, since a compilation looks like an endless loop from outside.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from keepstep.core import durations
from keepstep.core.beacon import Phase
from keepstep.core.durations import HELD_S, Usual, phase_of
from keepstep.core.ids import Node, Rank
from keepstep.core.states import AttemptState
from keepstep.decide import links, stacks
from keepstep.decide.plan import Pending, Policy, Verdict
from keepstep.decide.view import AttemptView, Examined, Finding, JobView, PartView, RankPhase, RankView
from keepstep.decide.waits import Blame, blame

STANDS = "stands still: "  # how reasons begin that are over when something moves again
COMPILES = re.compile(
    r"torch/_(dynamo|inductor|functorch)/|torch/fx/|torch/export/|triton/(compiler|runtime)/"
)
_REAPED_S = 2.0  # a process that has ended: its shim has so long to say how
_ODD = {
    "stopped": "is stopped, and no debugger holds it",
    "zombie": "is a zombie",
    "gone": "is gone, though nobody saw it end",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """A close look at every rank is needed before anything is said."""

    reason: str
    nodes: tuple[Node, ...]
    stacks: bool = True  # False: at processes and connections only


@dataclass(frozen=True, slots=True, kw_only=True)
class _Standstill:
    """A gang of which every rank was still for `still_s` when it last reported."""

    job: JobView
    attempt: AttemptView
    ranks: tuple[RankView, ...]  # those that run, and those that left with 0
    still_s: float
    looks: tuple[Examined, ...]  # close ones since the standstill began, oldest first

    @property
    def findings(self) -> tuple[Finding, ...]:
        return self.looks[-1].findings if self.looks else ()

    def node(self, rank: Rank) -> Node | None:
        return next((p.node for p in self.attempt.parts for one in p.ranks if one.rank == rank), None)


def hung(job: JobView, attempt: AttemptView, policy: Policy) -> Verdict | Pending | Suspicion | None:
    if attempt.state not in (AttemptState.STARTING, AttemptState.RUNNING):
        return None
    parts = [part for part in attempt.parts if part.heard]
    running = [one for part in parts for one in part.ranks if one.phase is RankPhase.RUNNING]
    traced = [one for one in running if one.process == "traced"]
    if traced and attempt.step_age_s >= HELD_S:
        who = stacks.ranks_of(tuple(one.rank for one in traced))
        reason = f"{STANDS}{who} is held by a debugger, and nothing is taken for hung while it is"
        return Pending(reason=reason, due_s=policy.examine_again_s)
    odd = _not_running(attempt, parts)
    if odd is not None:
        return odd
    still = _standstill(job, attempt, parts, running)
    return None if still is None else _judged(still, policy)


def _not_running(attempt: AttemptView, parts: Iterable[PartView]) -> Verdict | None:
    """Positive evidence: a process that cannot go on by itself, seen twice, and no step since."""
    for part in parts:
        for one in part.ranks:
            held_s = min(one.process_s, attempt.step_age_s)
            enough_s = HELD_S if one.process == "stopped" else _REAPED_S
            if one.phase is not RankPhase.RUNNING or one.process not in _ODD or held_s < enough_s:
                continue
            return Verdict(
                kind="hung",
                what=f"{_role(attempt, one.rank)} on {part.node} {_ODD[one.process]}",
                blame="infrastructure",
                rank=one.rank,
                node=part.node,
                began_s=one.process_s,
                signature=f"hung: {one.process}",
                noticed="its process was found so by two looks in a row, and no rank stepped meanwhile",
                evidence=(f"rank {one.rank}: process {one.process}, in {one.doing or 'no phase'}",),
            )
    return None


def _standstill(
    job: JobView, attempt: AttemptView, parts: list[PartView], running: list[RankView]
) -> _Standstill | None:
    if not running or len(parts) < len(attempt.parts) or not any(one.counter for one in running):
        return None  # nobody counts, or nobody can see
    if any(one.still_s is None for one in running):
        return None
    left = [one for part in parts for one in part.ranks if one.phase is RankPhase.EXITED]
    still_s = min(one.still_s or 0.0 for one in running)
    return _Standstill(
        job=job,
        attempt=attempt,
        ranks=(*running, *left),
        still_s=still_s,
        looks=tuple(
            look
            for look in job.examined
            if look.attempt == attempt.number and look.age_s <= still_s and look.stacks
        ),
    )


def _judged(still: _Standstill, policy: Policy) -> Verdict | Pending | Suspicion | None:
    job, attempt = still.job, still.attempt
    found = blame(still.ranks, attempt.layout, still.findings)
    learnt_s, why = _learnt(still, found)
    unknown_s = max(job.spec.recovery.hang_after_unknown_s, learnt_s or 0.0)
    early_s = max(policy.suspect_s, 10 * attempt.step_every_s) if attempt.stepped else policy.say_still_s
    # Where the bound is far (a phase that speaks to the world) a look may show what needs no bound.
    if still.still_s < min(learnt_s or unknown_s, early_s, policy.say_still_s, unknown_s):
        return None
    late = still.still_s >= (learnt_s or 0.0)
    said = still.still_s >= policy.say_still_s and late
    if not still.looks or (late and still.looks[-1].age_s > policy.examine_again_s):
        if not job.examining:
            reason = f"no rank of attempt {attempt.number} moves: looks at all of them closely"
            return Suspicion(reason=reason, nodes=attempt.nodes)
        return _said(still, found, unknown_s) if said and still.looks else None
    if found.mismatch:
        if len(still.looks) > 1 and _same(still, found):
            return _verdict(still, found, learnt_s, "two close looks agree, and nothing moved between them")
        if still.looks[-1].age_s >= policy.examine_soon_s and not job.examining:
            return Suspicion(reason=f"{found.why}: looks a second time", nodes=attempt.nodes)
    if learnt_s is not None and late and _may_act(still, found):
        return _verdict(still, found, learnt_s, why)
    if still.still_s >= unknown_s:
        why = f"nothing moved for {unknown_s:g} s (recovery.hang_after_unknown)"
        return _verdict(still, found, unknown_s, why)
    return _said(still, found, unknown_s) if said else None


def _said(still: _Standstill, found: Blame, unknown_s: float) -> Pending:
    """Nothing is done about it yet. The figure that runs down is `due_s`; the reason stays the same."""
    cut = _cut(still)
    who = f"the network is cut between {links.told(cut)}" if cut else _who(still, found)
    reason = f"{STANDS}no rank moves; {who}. It is ended when nothing has moved for {unknown_s:g} s"
    return Pending(reason=reason, due_s=max(unknown_s - still.still_s, HELD_S))


def _same(still: _Standstill, found: Blame) -> bool:
    """The look before the last one says so, too."""
    return blame(still.ranks, still.attempt.layout, still.looks[-2].findings).why == found.why


def _learnt(still: _Standstill, found: Blame) -> tuple[float | None, str]:
    """The most patient bound of all candidates, and where it comes from; None: one of them is not known."""
    override_s = still.job.spec.recovery.hang_after_s
    if not still.attempt.stepped:
        return _meeting(still)
    if override_s is not None:
        return override_s, f"nothing moved for {override_s:g} s (recovery.hang_after)"
    by_rank = {one.rank: one for one in still.ranks}
    longest, why = 0.0, ""
    for rank in found.ranks:
        doing, usual = _phase_of(still, by_rank.get(rank))
        each = durations.bound_s(doing, usual, outside=not found.named)
        if each is None:
            return None, ""
        if each > longest:
            name = doing.name.lower()
            longest = each
            why = (
                f"nothing moved for {each:.2f} s, the learnt bound of {name}: "
                f"{usual.count:,} of them took up to {usual.high_s:.3g} s, oddities apart"
            )
    return (longest or None), why


def _meeting(still: _Standstill) -> tuple[float | None, str]:
    """Of a rendezvous that does not come about though everybody is there, by what earlier starts took."""
    starts = still.job.measured.starts.values()
    if not starts or not _meets(still):
        return None, ""
    bound_s = durations.OUTSIDE_FLOOR_S + durations.FACTOR * max(starts)
    took = f"starts took up to {max(starts):.3g} s"
    return bound_s, f"nothing moved for {bound_s:.2f} s, the learnt bound of a rendezvous: {took}"


def _meets(still: _Standstill) -> bool:
    """Some ranks still look for the others, and none imports: told by the built-in trainer alone."""
    doing = {one.doing for one in still.ranks}
    return not still.attempt.stepped and "rendezvous" in doing and not doing & {"", "none", "starting"}


def _phase_of(still: _Standstill, one: RankView | None) -> tuple[Phase, Usual]:
    """What a candidate does; one that has left is judged by what the others wait in."""
    if one is not None and one.phase is RankPhase.EXITED:
        one = next((other for other in still.ranks if other.waiting_s is not None), None)
    phase = phase_of(one.doing if one is not None else "")
    return phase, still.job.usual.get(phase.name.lower(), Usual())


def _may_act(still: _Standstill, found: Blame) -> bool:
    """Whether one knows what the culprit does; compiling is no hang."""
    if still.job.spec.recovery.hang_after_s is not None:
        return True
    seen = {finding.rank: finding for finding in still.findings}
    suspects = [seen[rank] for rank in found.ranks if rank in seen]
    if any(COMPILES.search(frame) for finding in suspects for frame in finding.stack):
        return False
    if still.job.spec.run.kind == "llama":
        return True
    return len(suspects) == len(found.ranks) and all(
        finding.stack or finding.interpreter == "stuck" for finding in suspects
    )


def _verdict(still: _Standstill, found: Blame, bound_s: float | None, noticed: str) -> Verdict:
    cut = _cut(still)
    if cut:
        return _severed(still, cut, bound_s, noticed)
    culprit = found.ranks[0] if found.named else None
    by_rank = {one.rank: one for one in still.ranks}
    one = by_rank.get(culprit) if culprit is not None else None
    early = one is not None and one.phase is RankPhase.EXITED
    doing = "" if one is None else "left" if early else one.doing
    finding = next((each for each in still.findings if each.rank == culprit), Finding(rank=Rank(0)))
    return Verdict(
        kind="exited early" if early else "hung",
        what=_who(still, found),
        blame="infrastructure" if found.carrier or finding.process == "blocked" or _meets(still) else "job",
        rank=culprit,
        node=None if culprit is None else still.node(culprit),
        began_s=still.still_s,
        signature="exited early"
        if early
        else f"hung: {'mismatched collective' if found.mismatch else doing}",
        noticed=noticed,
        bound_s=bound_s,
        confidence=_sure(found),
        evidence=(
            *_processes(still, found),
            *stacks.told(still.findings, culprit),
            *(still.looks[-1].errors if still.looks else ()),
        )[:40],
    )


def _sure(found: Blame) -> float:
    if len(found.ranks) == 1 or (found.mismatch and not found.even):
        return 1.0
    return 0.5 if found.named else 0.0


def _cut(still: _Standstill) -> tuple[links.Link, ...]:
    """Links that explain a standstill whoever seems to stand out.

    Some ranks of a cut collective may be through it, as if the others were behind or did not fit. Whatever
    a rank does or fails to do, its kernel answers.
    """
    nodes = {one.rank: part.node for part in still.attempt.parts for one in part.ranks}
    return links.cut_ones(links.links(still.findings, nodes))


def _severed(still: _Standstill, cut: tuple[links.Link, ...], bound_s: float | None, noticed: str) -> Verdict:
    """Ranks that all wait while the kernel gets no answer between their nodes: no rank is to blame."""
    node = links.likeliest(cut, still.attempt.nodes, still.job.failures)
    sure = links.in_common(cut) is not None
    which = f"they have {node} in common" if sure else f"{node} is taken to be the end that fails"
    first = " ".join(cut[0].nodes)
    return Verdict(
        kind="hung",
        what=f"no rank is to blame: the network is cut between {links.told(cut)}; {which}",
        blame="infrastructure",
        node=node,
        began_s=still.still_s,
        signature=f"{links.CUT} {first}",
        noticed=noticed,
        bound_s=bound_s,
        confidence=0.9 if sure else 0.5,
        evidence=(*_processes(still, blame(still.ranks, still.attempt.layout, still.findings)),),
    )


def _who(still: _Standstill, found: Blame) -> str:
    if not found.named and _meets(still):
        lost = sum(one.doing == "rendezvous" for one in still.ranks)
        return f"{lost} of {len(still.ranks)} ranks do not find each other in their rendezvous"
    if not found.named:
        many = len(found.ranks)
        return f"no single rank of {many} stands out: {found.why}" if many > 1 else found.why
    rank = found.ranks[0]
    one = next((each for each in still.ranks if each.rank == rank), None)
    where = f"{_role(still.attempt, rank)} on {still.node(rank)}"
    if found.mismatch:
        return f"{where} does not fit the others: {found.why}"
    if one is not None and one.phase is RankPhase.EXITED:
        return f"{where} exited 0 after step {one.step}, and the others go on without it: {found.why}"
    doing = f"in {one.doing}" if one is not None and one.doing not in ("", "none") else "between two phases"
    finding = next((each for each in still.findings if each.rank == rank), None)
    how = ""
    if finding is not None and finding.process == "blocked":
        how = f", blocked in the kernel{f' ({finding.kernel})' if finding.kernel else ''}"
    elif finding is not None and finding.interpreter == "stuck":
        how = ", with the interpreter's lock held"
    return f"{where} stands {doing}{how}: {found.why}"


def _processes(still: _Standstill, found: Blame) -> tuple[str, ...]:
    """The candidates first: what they do, and what the kernel says of them."""
    seen = {finding.rank: finding for finding in still.findings}
    lines = []
    for one in sorted(still.ranks, key=lambda one: (one.rank not in found.ranks, one.rank))[:8]:
        finding = seen.get(one.rank)
        process = (finding.process if finding else "") or one.process or str(one.phase)
        kernel = f" in {finding.kernel}" if finding and finding.kernel else ""
        wait = ""
        if one.waiting_s is not None:
            whom = f"rank {one.peer}" if one.peer >= 0 else f"{one.group} {one.group_sequence}"
            wait = f", waits for {whom} since {one.waiting_s:.1f} s"
        lines.append(
            f"rank {one.rank}: {one.doing or 'no phase'}, step {one.step}, process {process}{kernel}{wait}"
        )
    return tuple(lines)


def _role(attempt: AttemptView, rank: Rank) -> str:
    inside = rank < attempt.layout.world_size
    return f"rank {rank}" + (f" ({attempt.layout.coordinates(rank)})" if inside else "")
