"""When nothing of an attempt can step, write or come back, so that the next one may start.

Dead means that no descendant is left. A part is known dead when its agent says so, or when there is positive
evidence that its node is dead. For parts that nobody can ask, three arguments remain, the strongest first:

    never went    its ranks were never told to start: there is nothing to wait for
    coupled       a gang that was seen to step cannot step without the ranks that are known dead; what is left
                  elsewhere blocks. If late writes are fenced it does no harm (at once); else its agent, alone
                  and without a step, ends it after `self_fence_s`
    lease         otherwise, or when no part is known dead (the gang is probably training), only the orphan
                  lease frees it, counted from the last word of each part that is not known dead
"""

from collections.abc import Mapping
from dataclasses import dataclass

from keepstep.core.ids import Node
from keepstep.core.job import JobSpec
from keepstep.decide.place import listed
from keepstep.decide.plan import Policy
from keepstep.decide.view import AttemptView, NodeView, PartPhase, PartView


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """Either how one knows that the attempt is dead, or (`how` empty) what it still waits for."""

    how: str
    reason: str
    due_s: float = 0.0  # when the wait is over at the latest, from now; 0: when somebody reports


def fenced(spec: JobSpec) -> bool:
    """Whether a late write of an old attempt does no harm."""
    return spec.run.kind == "llama" or spec.recovery.fenced


def orphan_lease_s(spec: JobSpec, policy: Policy) -> float:
    """What agents are told and the controller waits for must be the same number."""
    return min(spec.recovery.orphan_lease_s, policy.orphan_lease_s)


def alone_bound_s(spec: JobSpec, policy: Policy) -> float:
    """After so long without controller and step an agent has ended its ranks; the margin is in it."""
    bound_s = orphan_lease_s(spec, policy) if fenced(spec) else spec.recovery.self_fence_s
    return min(bound_s, orphan_lease_s(spec, policy)) + policy.fence_margin_s


def reachable(node: NodeView | None) -> bool:
    """Whether its agent can be asked now."""
    return node is not None and node.connected and not node.confirmed


def known_dead(part: PartView, node: NodeView | None) -> bool:
    """A part is started at most once, so its death is for good."""
    ended = part.phase is PartPhase.DEAD or (part.phase is PartPhase.REFUSED and part.alive == 0)
    return ended or (node is not None and bool(node.confirmed))


def death(
    attempt: AttemptView,
    spec: JobSpec,
    nodes: Mapping[Node, NodeView],
    policy: Policy,
    *,
    returned: bool = True,
) -> Death:
    """`returned`: agents had their time to come back after this controller's start."""
    dead = [part for part in attempt.parts if known_dead(part, nodes.get(part.node))]
    living = [part for part in attempt.parts if not known_dead(part, nodes.get(part.node))]
    if not living:
        return Death(
            how="confirmed", reason=f"{_confirmed(dead, nodes)}: nothing of attempt {attempt.number} is left"
        )
    asked = [part for part in living if reachable(nodes.get(part.node)) and not _never(attempt, part)]
    if asked:
        return _being_ended(attempt, asked, policy)
    away = [part for part in living if not reachable(nodes.get(part.node))]
    names = _names(away)
    if not attempt.went:
        return Death(
            how="confirmed",
            reason=f"attempt {attempt.number} never went: {names or 'nobody'} has no rank of it",
        )
    if not returned:
        return Death(
            how="",
            reason=f"{names} has {policy.return_within_s:g} s to come back",
            due_s=policy.return_within_s,
        )
    silence_s = min(_silence_s(part, nodes) for part in away)
    coupled = spec.run.kind == "llama" or attempt.stepped
    if dead and coupled:
        if fenced(spec):
            reason = (
                f"{_names(dead)} is dead, so what is left on {names} cannot step, and its writes are fenced"
            )
            return Death(how="fenced", reason=reason)
        return _self_fenced(attempt, spec, policy, names, silence_s)
    return _leased(attempt, spec, policy, names, silence_s, "" if dead else "no node of it answers")


def _never(attempt: AttemptView, part: PartView) -> bool:
    """Of an attempt that never went, a part that nobody has reported was not even prepared."""
    return not attempt.went and not part.heard and part.phase is PartPhase.UNKNOWN


def _being_ended(attempt: AttemptView, asked: list[PartView], policy: Policy) -> Death:
    what = ", ".join(
        f"{part.alive} {'process' if part.alive == 1 else 'processes'} on {part.node}"
        if part.heard
        else f"word of {part.node}"
        for part in asked
    )
    if attempt.age_s < policy.end_within_s:
        due_s = policy.end_within_s - attempt.age_s
        return Death(how="", reason=f"attempt {attempt.number} is being ended: waits for {what}", due_s=due_s)
    return Death(
        how="",
        reason=f"attempt {attempt.number} does not die: after {policy.end_within_s:g} s it waits for {what}; "
        "processes that SIGKILL does not end hang in the kernel: reboot the node, then confirm it lost",
        due_s=policy.end_within_s,
    )


def _self_fenced(attempt: AttemptView, spec: JobSpec, policy: Policy, names: str, silence_s: float) -> Death:
    """An agent alone counts from its last word *and* its last step, which the others' death bounds."""
    bound_s = spec.recovery.self_fence_s + policy.fence_margin_s
    lone_s = min(silence_s, attempt.still_s)
    figures = (
        f"{spec.recovery.self_fence_s:g} s alone without a step, and {policy.fence_margin_s:g} s of margin"
    )
    if lone_s >= bound_s:
        return Death(how="self-fence", reason=f"{names} has ended its ranks by itself by now: {figures}")
    lease_s = orphan_lease_s(spec, policy) + policy.fence_margin_s
    if silence_s >= lease_s:
        return _leased(attempt, spec, policy, names, silence_s, "")
    return Death(
        how="",
        reason=f"{names} does not answer; it ends its ranks by itself after {figures}",
        due_s=bound_s - lone_s,
    )


def _leased(
    attempt: AttemptView, spec: JobSpec, policy: Policy, names: str, silence_s: float, why: str
) -> Death:
    lease_s, margin_s = orphan_lease_s(spec, policy), policy.fence_margin_s
    if silence_s >= lease_s + margin_s:
        return Death(
            how="lease",
            reason=f"the lease of {names} has run out: no word for {lease_s:g} s and {margin_s:g} s more",
        )
    why = why or f"attempt {attempt.number} was never seen to step, so {names} may run without the others"
    return Death(
        how="",
        reason=f"{why}: nothing starts elsewhere before there is word of {names}, or its loss is confirmed "
        f"(keepstep node confirm-lost), or its orphan lease of {lease_s:g} s has run out",
        due_s=lease_s + margin_s - silence_s,
    )


def _silence_s(part: PartView, nodes: Mapping[Node, NodeView]) -> float:
    """Of a node that the fleet knows nothing of, nothing is known: no lease runs."""
    node = nodes.get(part.node)
    return 0.0 if node is None else node.silence_s


def _names(parts: list[PartView]) -> str:
    return listed([part.node for part in parts])


def _confirmed(dead: list[PartView], nodes: Mapping[Node, NodeView]) -> str:
    reports = [part.node for part in dead if part.phase in (PartPhase.DEAD, PartPhase.REFUSED)]
    said = [f"{listed(reports)} {'reports' if len(reports) == 1 else 'report'} its end"] if reports else []
    for part in dead:
        node = nodes.get(part.node)
        if part.node not in reports and node is not None:
            said.append(f"{part.node} is lost ({node.confirmed})")
    return listed(said)
