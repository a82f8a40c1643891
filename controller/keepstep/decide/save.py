"""What is in memory is stored before those that hold it are let go of.

Nodes that a job gives up (it waits for others, rests, fails, or begins again elsewhere) end their carriers,
and with them go the only copies of steps that no checkpoint has. So such a change waits until the newest
state that is whole in memory is stored, if it is newer than what is known to be stored. It waits within a
bound and tries once: a storage that is full or gone makes a job no worse off than it was without.

A restart from that state, on nodes that hold all of it, waits for nothing. But spares that keep copies are
asked anew when the attempt is dead, if a rank's own memory is gone: what they said before may have been
replaced since.
"""

from collections.abc import Collection

from keepstep.core.ids import Node
from keepstep.core.states import JobState
from keepstep.decide.place import listed
from keepstep.decide.plan import Collect, Dead, GiveUp, JobChange, Place, Policy, Requeue, Rest, Save, Wait
from keepstep.decide.recover import stores
from keepstep.decide.restore import RestorePoint, memory_point, restore_point
from keepstep.decide.view import JobView


def saved_first(
    job: JobView, change: JobChange | None, policy: Policy, leaving: Collection[Node] = ()
) -> JobChange | None:
    """`change`, or what has to come before it. `leaving`: who ends its carriers whatever is decided."""
    staying = _staying(job, change)
    if isinstance(change, Collect) and any(one.node in leaving for one in job.held):
        staying = sorted({one.node for one in job.held})  # who leaves does not wait for an answer
    unsure = _unsure(job)
    if unsure and (staying is not None or isinstance(change, Collect)):
        reason = f"asks {listed(unsure)} what it holds now of ranks whose own memory is gone"
        return Wait(job=job.id, reason=reason, due_s=policy.collect_within_s)
    if change is None or staying is None or not job.held or not stores(job):
        return change
    point = memory_point(job.lineage, job.held, job.spec.parallelism)
    if point.at is None or point.memory is None or point.at.step <= _stored_step(job):
        return change
    restored = not isinstance(change, Place) or change.restore == point.at
    if restored and _whole(job, point, [node for node in staying if node not in leaving]):
        return change
    saving = job.saving
    if saving is None or saving.at != point.at:
        reason = f"step {point.at.step} is in memory only: it is stored before {_giving_up(job, change)}"
        within_s = policy.save_within_s
        return Save(job=job.id, reason=reason, at=point.at, memory=point.memory, within_s=within_s)
    if saving.done or saving.error or saving.age_s >= policy.save_within_s:
        return change
    reason = f"step {point.at.step} is being stored from memory, for {policy.save_within_s:g} s at most"
    return Wait(job=job.id, reason=reason, due_s=policy.save_within_s - saving.age_s)


def _staying(job: JobView, change: JobChange | None) -> Collection[Node] | None:
    """Who goes on holding what they hold; None: nobody is given up."""
    match change:
        case Place():
            return (*change.nodes, *change.spares)
        case Requeue() | GiveUp() | Rest():
            return ()
        case Dead() if job.state in (JobState.SUSPENDING, JobState.CANCELLING):
            return ()
    return None


def _unsure(job: JobView) -> list[Node]:
    """Who may hold what nobody else does, and has not been heard since."""
    own = {(one.world, one.rank) for one in job.held if one.own}
    return sorted({one.node for one in job.kept if not one.fresh and (one.world, one.rank) not in own})


def _giving_up(job: JobView, change: JobChange) -> str:
    if not isinstance(change, Place):
        return "its nodes are let go of"
    gone = sorted({one.node for one in job.kept} - {*change.nodes, *change.spares})
    if not gone:
        return "the job begins from elsewhere"
    return f"{listed(gone)}, which has a part of it that others have not, is let go of"


def _stored_step(job: JobView) -> int:
    """The newest step that is known to be stored."""
    stored = restore_point(job.lineage, job.inventory.stored).at if job.inventory is not None else None
    return max(job.checkpoint_step, int(stored.step) if stored is not None else -1)


def _whole(job: JobView, point: RestorePoint, nodes: Collection[Node]) -> bool:
    """Whether these alone hold all of that state."""
    there = [one for one in job.held if one.node in nodes]
    return memory_point(job.lineage, there, job.spec.parallelism).at == point.at
