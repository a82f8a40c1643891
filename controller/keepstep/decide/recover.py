"""The ladder: how a job that lost its attempt comes back, and how a shrunk one grows again.

    in place        the same nodes, as soon as the old ranks are dead: their standby servers are warm
    spare           nodes that stand by, or free ones, take the place of those that cannot be used
    fewer replicas  not below elastic.min_dp, and only numbers that divide the batch
    requeue         give the nodes up; wait for others, or for the back-off

A cell is the whole gang today, so "cell in place" restarts the gang. The cheapest rung that holds is taken
(`price`); it names the others, and what they would have cost or why they were none. Growing is the same
ladder looked at from below: when enough nodes have been ready for a while, the running attempt is ended at a
moment that costs little, and the ladder finds the larger layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from keepstep.core.ids import Attempt, JobId, Node
from keepstep.core.layout import Layout
from keepstep.core.states import WORKING, NodeState
from keepstep.decide import price
from keepstep.decide.budget import budget, tried_elsewhere
from keepstep.decide.links import CUT
from keepstep.decide.lying import suspects
from keepstep.decide.place import (
    Holders,
    Placement,
    Survey,
    count,
    layouts,
    listed,
    missing,
    place,
    survey,
    told,
)
from keepstep.decide.plan import Collect, End, GiveUp, Place, Policy, Rejected, Requeue, Wait
from keepstep.decide.restore import RestorePoint, memory_point, restore_point
from keepstep.decide.view import NOTHING, AttemptView, Ended, JobView, Link, Stored, View

Others = Mapping[JobId, JobView]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rung:
    name: str
    placement: Placement
    rejected: tuple[Rejected, ...]


def recover(
    job: JobView, view: View, held: Holders, others: Others, policy: Policy
) -> Place | Requeue | GiveUp | Collect | Wait:
    """A job between two attempts: the last one is dead."""
    allowed = budget(job, policy)
    if allowed.exhausted:
        return GiveUp(job=job.id, reason=allowed.exhausted, exit_code=allowed.exit_code)
    if allowed.wait_s:
        rejected = (Rejected(option="in place", why="its back-off comes first"),)
        return Requeue(job=job.id, reason=allowed.reason, wait_s=allowed.wait_s, rejected=rejected)
    if job.ended is None:
        return Requeue(job=job.id, reason="nothing is known of where it ran", wait_s=0.0)
    away = _coming_back(job.ended, view, policy)
    if away:
        reason = (
            f"waits for {listed(away)} to come back, {policy.silent_after_s:g} s after its last word at most"
        )
        if view.up_s < policy.return_within_s:
            reason = (
                f"{listed(away)} has {policy.return_within_s:g} s to come back after the controller's start"
            )
        return Wait(
            job=job.id, reason=reason, due_s=max(policy.silent_after_s, policy.return_within_s - view.up_s)
        )
    rung = _rung(job, job.ended, view, held, policy)
    if isinstance(rung, tuple):
        there = survey(job, view.nodes, held)
        lacking = missing(job, there, held, others, smaller=True)
        return Requeue(
            job=job.id,
            reason=f"no rung of the ladder holds: {lacking.reason}",
            wait_s=0.0,
            rejected=(*rung, *lacking.rejected),
        )
    return begin(job, view, held, policy, rung.placement, rung.name, rung.rejected)


def begin(
    job: JobView,
    view: View,
    held: Holders,
    policy: Policy,
    placement: Placement,
    rung: str,
    rejected: tuple[Rejected, ...] = (),
) -> Place | Collect | Wait:
    """Place the next attempt, once it is known what it restores."""
    point = _in_memory(job, placement.layout, view, policy)
    if not _serves(job, point):
        if needs_inventory(job):
            return collect(job, view, held, policy)
        point = _stored(job, point)
    number = Attempt(job.attempts + 1)
    what = point.reason or ("it begins from nothing" if not job.attempts else "the script restores itself")
    return Place(
        job=job.id,
        reason=f"attempt {number} ({rung}): {told(job, placement, view.nodes)}; {what}",
        rejected=rejected,
        attempt=number,
        nodes=placement.nodes,
        spares=placement.spares,
        layout=placement.layout,
        link=point.link(number) if point.at is not None else Link(attempt=number, parent=NOTHING),
        restore=point.at,
        memory=point.memory,
        rung=rung,
    )


def _in_memory(job: JobView, layout: Layout, view: View, policy: Policy) -> RestorePoint:
    """The newest state in memory that the layout can begin from: a script's is cut anew by nobody.

    Nor can what is held be had from a node that goes, or whose link to the others was found cut.
    """
    out_of_reach = {node.name for node in view.nodes if node.leaving}
    out_of_reach |= {
        one.node for one in job.failures
        if one.node is not None and one.signature.startswith(CUT) and one.age_s < policy.cut_for_s
    }  # fmt: skip
    held = [one for one in job.held if one.node not in out_of_reach]
    point = memory_point(job.lineage, held, job.spec.parallelism)
    if point.at is None or point.memory is None or job.spec.run.kind == "llama":
        return point
    if point.memory.layout == layout:
        return point
    return RestorePoint(at=None, reason=f"step {point.at.step} is in memory as {point.memory.layout}")


def _serves(job: JobView, point: RestorePoint) -> bool:
    """Whether a state in memory is known to be as new as anything stored.

    Every attempt began from the newest state that there was, so only the last one can have stored a newer
    one.
    """
    if point.at is None or point.memory is None:
        return False
    return point.at.step >= max(job.checkpoint_step, job.lineage[-1].parent_step)


def _stored(job: JobView, memory: RestorePoint) -> RestorePoint:
    """The newest stored state, or what is in memory after all; what is not there is said."""
    if not stores(job) or job.inventory is None:
        return RestorePoint(at=None, reason="")
    point = restore_point(job.lineage, job.inventory.stored)
    if point.at is not None and not keeps_checkpoints(job) and not _still_newest(job, point.at):
        point = RestorePoint(at=None, reason=f"{point.reason}, but its script has come further since")
    if memory.at is not None and memory.at.step > (point.at.step if point.at else 0):
        return memory
    if job.kept:  # also an older state of it: whoever expected memory to serve finds why it did not
        return replace(point, reason=f"{point.reason}; {memory.reason}")
    return point


def keeps_checkpoints(job: JobView) -> bool:
    """Whether ranks' own checkpoints can be listed: only the built-in trainer's folder speaks for itself."""
    return job.spec.run.kind == "llama" and job.spec.checkpoint.dir is not None


def stores(job: JobView) -> bool:
    """Whether keepstep itself writes to the folder: its own trainer, or carriers what a script keeps."""
    script = job.spec.checkpoint.dir is not None and bool(job.spec.checkpoint.snapshot_every_steps)
    return keeps_checkpoints(job) or script


def _still_newest(job: JobView, at: Stored) -> bool:
    """A script may have checkpoints of its own: what was stored of its memory counts while none is newer.

    As in memory, by as many steps as lie between two snapshots.
    """
    return job.steps_done - at.step <= 2 * (job.spec.checkpoint.snapshot_every_steps or 1)


def needs_inventory(job: JobView) -> bool:
    if not stores(job) or not job.attempts:
        return False
    found = job.inventory
    return found is None or found.after_attempt != job.attempts or bool(found.error)


def collect(job: JobView, view: View, held: Holders, policy: Policy) -> Collect | Wait:
    """Ask one node after the other what is stored; a node that does not answer in time is passed over."""
    asked = {one.node: one.age_s for one in job.asked if one.kind == "inventory"}
    error = job.inventory.error if job.inventory is not None and needs_inventory(job) else ""
    failed = job.inventory.node if job.inventory is not None and error else None
    within_s = policy.collect_within_s
    waiting = {name: age_s for name, age_s in asked.items() if age_s < within_s and name != failed}
    if waiting:
        reason = f"waits {within_s:g} s for {listed(sorted(waiting))} to list the checkpoints"
        return Wait(job=job.id, reason=reason, due_s=within_s - min(waiting.values()))
    first = job.ended.nodes if job.ended is not None else ()
    able = [node.name for node in survey(job, view.nodes, held, first).free]
    # Nodes of other jobs can read a shared folder as well as free ones.
    able += [node.name for node in survey(job, view.nodes, {}, first).free if node.name not in able]
    fresh = [name for name in able if name not in asked and name != failed]
    again = sorted(
        (name for name in able if asked.get(name, within_s) >= within_s),
        key=lambda n: -asked.get(n, within_s),
    )
    said = (
        f"{failed} could not look ({error})"
        if error
        else f"{listed(sorted(asked))} did not answer"
        if asked
        else ""
    )
    if fresh or again:
        node = (fresh or again)[0]
        reason = f"asks {node} what attempts up to {job.attempts} have stored" + (f": {said}" if said else "")
        return Collect(job=job.id, reason=reason, kind="inventory", node=node, within_s=within_s)
    reason = "no node can list the checkpoints" + (f": {said}" if said else "")
    return Wait(job=job.id, reason=reason, due_s=within_s)


def grow(job: JobView, attempt: AttemptView, view: View, held: Holders, policy: Policy) -> End | None:
    """End a gang that runs with fewer replicas than asked for, when there is room for more."""
    larger = [layout for layout in layouts(job.spec) if layout.dp > attempt.layout.dp]
    if not larger or not attempt.stepped:
        return None
    there = _steady(job, survey(job, view.nodes, held, attempt.nodes), attempt.nodes, policy)
    room = next((found for layout in larger if (found := place(job, there, layout)) is not None), None)
    if room is None:
        return None
    joining = [node for node in there.free if node.name in room.nodes and node.name not in attempt.nodes]
    waited_s = min((node.ready_s for node in joining), default=policy.grow_after_s) - policy.grow_after_s
    at = moment(job, attempt, waited_s, policy)
    if at is None:
        return None
    return End(
        job=job.id,
        attempt=attempt.number,
        grace_s=job.spec.run.stop.grace_s,
        reason=f"grows from {attempt.layout.dp} to {count(room.layout.dp, 'replica')}: "
        f"{listed([one.name for one in joining])} has been ready for {policy.grow_after_s:g} s; {at}",
        rejected=(
            Rejected(option=f"stay at {count(attempt.layout.dp, 'replica')}", why="more nodes are ready"),
        ),
    )


def moment(job: JobView, attempt: AttemptView, waited_s: float, policy: Policy) -> str | None:
    """A moment at which little would be done again, or None while such a one may still come."""
    if not keeps_checkpoints(job):
        return "its script restores itself"
    if 0 <= attempt.step <= attempt.snapshot_step + 1:
        return f"step {attempt.snapshot_step} is in memory"
    behind = attempt.step - attempt.checkpoint_step
    seconds = behind * attempt.step_every_s
    cheap = behind <= 1 or 0 < seconds <= policy.silent_after_s
    if attempt.checkpoint_step >= 0 and cheap:
        return f"step {attempt.checkpoint_step} has just been stored"
    if waited_s >= policy.grow_within_s:
        return f"no checkpoint came at a better moment within {policy.grow_within_s:g} s"
    return None


def _steady(job: JobView, there: Survey, own: Sequence[Node], policy: Policy) -> Survey:
    """Without nodes that have only just come: a flapping node is nothing to grow onto."""
    return Survey(
        free=tuple(node for node in there.free if node.name in own or node.ready_s >= policy.grow_after_s),
        refused=there.refused,
    )


def _coming_back(ended: Ended, view: View, policy: Policy) -> list[Node]:
    """Nodes of the last attempt that are away for a moment only, as far as anybody can know yet."""
    away = []
    for name in ended.nodes:
        node = view.node(name)
        if node is None or node.confirmed or node.state in (NodeState.LOST, NodeState.GONE):
            continue
        if node.life not in WORKING:
            continue
        just_started = view.up_s < policy.return_within_s
        if not node.connected and (just_started or node.silence_s < policy.silent_after_s):
            away.append(name)
    return away


def _rung(
    job: JobView, ended: Ended, view: View, held: Holders, policy: Policy
) -> _Rung | tuple[Rejected, ...]:
    """The cheapest rung of those that hold; or why none does."""
    there = survey(job, view.nodes, held, (*ended.nodes, *ended.spares), _others_first(job, policy))
    impossible: list[Rejected] = []
    fitting: list[tuple[str, Placement]] = []
    for layout in layouts(job.spec):
        larger = layout.dp > ended.layout.dp
        usable = _steady(job, there, ended.nodes, policy) if larger else there
        placement = place(job, usable, layout)
        if placement is None:
            impossible.extend(_not_taken(job, ended, layout, view, usable, held))
            continue
        placement = _same_ranks(job, placement, ended, usable)
        name = _name(placement, ended)
        if name in ("spare", "grow") and not fitting:
            impossible += _not_in_place(ended, usable, layout)
        fitting.append((name, placement))
    smallest = Rejected(option="fewer replicas", why=f"elastic.min_dp is {job.spec.elastic.min_dp}")
    if not any(name == "fewer replicas" for name, _ in fitting):
        impossible.append(smallest)
    if not fitting:
        return tuple(impossible)
    priced = price.options(job, ended, fitting, there.free, policy)
    taken = next(option for option in priced if option.placement is not None)
    assert taken.placement is not None
    others = price.rejected(taken, priced, job.spec.parallelism.world_size)
    return _Rung(name=taken.name, placement=taken.placement, rejected=(*impossible, *others))


def _others_first(job: JobView, policy: Policy) -> frozenset[Node]:
    """Nodes that are only taken when there are no others."""
    return suspects(job.failures) | tried_elsewhere(job, policy)


def _name(placement: Placement, ended: Ended) -> str:
    if placement.layout.dp > ended.layout.dp:
        return "grow"
    if placement.layout.dp < ended.layout.dp:
        return "fewer replicas"
    return "in place" if placement.nodes == ended.nodes else "spare"


def _same_ranks(job: JobView, placement: Placement, ended: Ended, there: Survey) -> Placement:
    """Nodes that stay keep their node rank, so that what they hold in memory stays theirs."""
    if placement.layout.dp != ended.layout.dp:
        return placement
    stay = set(placement.nodes) & set(ended.nodes)
    substitutes = iter([name for name in placement.nodes if name not in stay])
    nodes = tuple(name if name in stay else next(substitutes) for name in ended.nodes)
    return Placement(nodes=nodes, spares=placement.spares, layout=placement.layout)


def _not_taken(
    job: JobView, ended: Ended, layout: Layout, view: View, there: Survey, held: Holders
) -> list[Rejected]:
    """A layout that does not fit: as many options as it stands for."""
    need, have = job.spec.nodes_for(layout.dp), len(there.free)
    lack = f"{layout} needs {count(need, 'node')}, {have} can be used"
    if layout.dp > ended.layout.dp:
        return [Rejected(option=f"grow to {layout.dp}", why=lack)]
    if layout.dp < ended.layout.dp:
        return [Rejected(option=f"fewer replicas ({layout.dp})", why=lack)]
    return [*_not_in_place(ended, there, layout), Rejected(option="spare", why=lack)]


def _not_in_place(ended: Ended, there: Survey, layout: Layout) -> list[Rejected]:
    if layout.dp != ended.layout.dp:
        return [Rejected(option="in place", why=f"there is room for {count(layout.dp, 'replica')}")]
    whys = [
        f"{name} {there.refused.get(name, 'is not known')}" for name in ended.nodes if name in there.refused
    ]
    unknown = [
        name for name in ended.nodes if name not in there.refused and name not in {n.name for n in there.free}
    ]
    whys += [f"{name} is not in the fleet" for name in unknown]
    return [Rejected(option="in place", why=listed(whys) or "another node is preferred")]
