"""Which stored state the next attempt begins from.

Every attempt began from its parent's state after some step, so the attempts of a job form a tree, and the
present one is the end of a chain. A checkpoint (attempt, step) may be restored only if it lies on that chain:
its attempt is the last one or an ancestor, and its step is neither past the point where the chain left that
ancestor nor past the last one that is known to be good. What an old attempt wrote later lies on a branch that
was left, whatever its step or file time says.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from keepstep.core.ids import Attempt, Step
from keepstep.decide.view import BEGINNING, NOTHING, Link, Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePoint:
    at: Stored | None  # None: nothing on the chain was ever stored
    reason: str

    def link(self, attempt: Attempt) -> Link:
        """How the attempt that begins here joins the lineage."""
        if self.at is None:
            return Link(attempt=attempt, parent=NOTHING, parent_step=BEGINNING)
        return Link(attempt=attempt, parent=self.at.attempt, parent_step=self.at.step)


def chain(lineage: Sequence[Link]) -> Mapping[Attempt, Step | None]:
    """The last attempt and its ancestors, each with the last step that lies on the chain (None: any)."""
    by_attempt = {link.attempt: link for link in lineage}
    limits: dict[Attempt, Step | None] = {}
    link = lineage[-1] if lineage else None
    limit: Step | None = None
    while link is not None:
        if link.good_until is not None:
            limit = link.good_until if limit is None else min(limit, link.good_until)
        limits[link.attempt] = limit
        if link.parent >= link.attempt or link.parent == NOTHING:
            break  # a lineage that does not go back in time is not followed
        limit = link.parent_step if limit is None else min(limit, link.parent_step)
        link = by_attempt.get(link.parent)
    return limits


def restore_point(lineage: Sequence[Link], stored: Iterable[Stored]) -> RestorePoint:
    """The newest stored state on the chain of the last attempt; says why newer ones were left out."""
    limits = chain(lineage)
    newest_first = sorted(stored, key=lambda one: (one.step, one.attempt), reverse=True)
    left_out: list[str] = []
    for one in newest_first:
        if one.attempt not in limits:
            left_out.append(f"step {one.step} of attempt {one.attempt} is not on the chain")
            continue
        limit = limits[one.attempt]
        if limit is None or one.step <= limit:
            return RestorePoint(
                at=one,
                reason="; ".join([f"step {one.step} of attempt {one.attempt} is stored", *left_out[:3]]),
            )
        left_out.append(
            f"step {one.step} of attempt {one.attempt} is past step {limit}, where the chain left it"
        )
    nothing = "nothing is stored" if not newest_first else "nothing stored is on the chain"
    return RestorePoint(at=None, reason="; ".join([nothing, *left_out[:3]]))
