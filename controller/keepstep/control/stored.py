"""What of a job is in storage: asked of a node that can see it, or made of what nodes have in memory.

A state is stored in two stages: every holder writes its ranks' slots, then one of them completes the
checkpoint. A holder that cannot write its part (its carrier was killed, a slot is damaged) is followed by the
next one that has it; when there is none, what was written is removed and the job goes on as it would have.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from keepstep.control.book import Entry
from keepstep.control.desired import checkpoint_folder
from keepstep.control.fleet import Fleet
from keepstep.core.errors import KeepstepError, Refused, TimedOut
from keepstep.core.ids import Attempt, Node, Step
from keepstep.decide.place import listed
from keepstep.decide.plan import Collect, Save
from keepstep.decide.view import Inventory, Stored
from keepstep.store.rows import NewEvent

log = logging.getLogger(__name__)
_DISCARD_S = 10.0
_WHY_MAX = 300


async def inventory(
    fleet: Fleet, entry: Entry, question: Collect, *, term: int, told: Callable[[], None]
) -> None:
    """What a decision asked for; the next one finds it in its view."""
    after = newest(entry)
    found: tuple[Stored, ...] = ()
    error = ""
    try:
        answer = await fleet.ask(
            question.node,
            question.kind,
            {"dir": checkpoint_folder(entry.spec, entry.job.id)},
            term=term,
            within_s=question.within_s,
        )
        found = tuple(
            Stored(attempt=Attempt(a), step=Step(s)) for a, s, complete in answer["checkpoints"] if complete
        )
    except KeepstepError as problem:
        error = str(problem)
    if newest(entry) == after:
        entry.inventory = Inventory(after_attempt=after, node=question.node, stored=found, error=error)
        told()


async def save(
    fleet: Fleet, entry: Entry, order: Save, *, term: int, tell: Callable[[NewEvent], Awaitable[None]]
) -> None:
    """Store a state that is in memory; what came of it is an event, and in the next view."""
    log.info("%s: %s", order.job, order.reason)
    after, at = newest(entry), order.at
    work = _Work(fleet, entry, order, term, after)
    await tell(work.event("saving", order.reason))
    try:
        async with asyncio.timeout(order.within_s):
            by = await work.run()
        kind, text, error = "saved", f"step {at.step} is stored from memory, written by {listed(by)}", ""
        if not by:
            text = f"step {at.step} was stored already"
    except (KeepstepError, TimeoutError, LookupError, TypeError, ValueError) as problem:
        slow = f"it took longer than {order.within_s:g} s"
        error = slow if isinstance(problem, TimeoutError) else str(problem) or repr(problem)
        kind, text = "save_failed", f"step {at.step} could not be stored from memory: {error[:_WHY_MAX]}"
        await work.discard()
    present = entry.saving
    if newest(entry) == after and present is not None and present[1].at == at:
        entry.saving = present[0], replace(present[1], done=not error, error=error)
        if not error:
            entry.progress.checkpoint_step = max(entry.progress.checkpoint_step, at.step)
            entry.inventory, entry.asked = None, {}  # there is more by now than was listed
    await tell(work.event(kind, text))


def newest(entry: Entry) -> Attempt:
    return Attempt(entry.attempts[-1].number if entry.attempts else 0)


class _Work:
    def __init__(self, fleet: Fleet, entry: Entry, order: Save, term: int, after: Attempt) -> None:
        self._fleet, self._order, self._term = fleet, order, term
        self._after = after
        # The built-in trainer removes old checkpoints itself, whoever wrote them.
        self._keep = None if entry.spec.run.kind == "llama" else entry.spec.checkpoint.keep
        lineage = [[link.attempt, link.parent, link.parent_step] for link in entry.lineage()]
        self._about = {
            "job": order.job, "dir": checkpoint_folder(entry.spec, order.job),
            "at": [order.at.attempt, order.at.step], "world": order.memory.layout.world_size,
            "lineage": lineage,
        }  # fmt: skip
        self._nodes: list[Node] = []  # that were asked to write

    def event(self, kind: str, text: str) -> NewEvent:
        return NewEvent(
            kind=kind, text=text, job=self._order.job, attempt=self._after, data={"step": self._order.at.step}
        )

    async def run(self) -> list[Node]:
        """Who wrote it; nobody if it was there. Errors: what the last holder of a rank could not do."""
        left = {rank: list(nodes) for rank, nodes in enumerate(self._order.memory.holders)}
        files: dict[str, Any] = {}
        about: dict[str, Any] = {}
        writers: dict[Node, None] = {}
        while left:
            shares: dict[Node, list[int]] = {}
            for rank, nodes in left.items():
                shares.setdefault(nodes[0], []).append(rank)
            answers = await asyncio.gather(*(self._write(node, ranks) for node, ranks in shares.items()))
            for (node, ranks), answer in zip(shares.items(), answers, strict=True):
                if isinstance(answer, KeepstepError):
                    for rank in ranks:
                        if not left[rank][1:]:
                            raise answer
                        left[rank].pop(0)
                    continue
                if answer.get("complete"):
                    return []
                files |= answer["files"]
                about = answer["about"]
                writers[node] = None
                for rank in ranks:
                    del left[rank]
        await self._seal(list(writers), files, about)
        return list(writers)

    async def _write(self, node: Node, ranks: list[int]) -> dict[str, Any] | KeepstepError:
        self._nodes.append(node)
        try:
            answer = await self._ask(node, "write", {"ranks": ranks})
        except KeepstepError as error:
            return error
        if not isinstance(answer, dict):
            return Refused(f"node {node} answered what is no list of files")
        return answer

    async def _seal(self, writers: list[Node], files: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        layout = asdict(self._order.memory.layout)
        more = {
            "files": files, "about": about, "layout": layout, "after": self._after, "keep": self._keep,
        }  # fmt: skip
        for k, node in enumerate(writers):
            try:
                await self._ask(node, "seal", more)
            except KeepstepError:
                if k == len(writers) - 1:
                    raise
            else:
                return

    async def discard(self) -> None:
        """What was written of it: on a full disk it is in everybody's way."""
        for node in dict.fromkeys(self._nodes):
            try:
                await self._ask(node, "discard", {}, within_s=_DISCARD_S)
            except KeepstepError as error:
                log.warning("%s: what was stored by half is still there: %s", self._order.job, error)
            else:
                return

    async def _ask(
        self, node: Node, stage: str, more: Mapping[str, Any], within_s: float | None = None
    ) -> Any:
        bound_s = self._order.within_s if within_s is None else within_s
        params = {**self._about, **more, "stage": stage, "within_s": bound_s}
        try:
            return await self._fleet.ask(node, "save", params, term=self._term, within_s=bound_s)
        except TimedOut:
            raise
        except KeepstepError as error:
            raise Refused(str(error)) from error
