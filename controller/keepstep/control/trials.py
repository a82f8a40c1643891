"""Runs jobs of keepstep's own that try nodes, and judges what their ranks say.

A trial has a name that says what it is for: a controller that comes after another one finds it by that, and
waits for the same job instead of trying again.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from keepstep.control.submission import enter
from keepstep.core.errors import KeepstepError
from keepstep.core.ids import Node
from keepstep.core.job import JobSpec
from keepstep.core.validation import MARK, Result, results
from keepstep.decide.trial import trial
from keepstep.decide.validation import Judged, Kept, Verdict, judge
from keepstep.spec import from_dict
from keepstep.store import Writer
from keepstep.store.rows import AttemptRow, Job, NewEvent

if TYPE_CHECKING:
    from keepstep.control.loop import Controller

log = logging.getLogger(__name__)

_LOOK_S = 5.0
_LOGS_WITHIN_S = 30.0
_LOGS_BYTES = 1 << 20
_HISTORY_MAX = 1000
_WHO = "keepstep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Came:
    """What a trial came to."""

    job: str
    judged: Judged


class Trials:
    def __init__(self, controller: "Controller") -> None:
        self._controller = controller

    async def run(
        self,
        name: str,
        nodes: Sequence[Node],
        *,
        wanted: Callable[[], bool],
        of: JobSpec | None = None,
        pair: bool = False,
        start_within_s: float | None = None,
    ) -> Came | None:
        """None: it was not wanted any more, did not start in time, or its ranks' words cannot be read now.

        Where nothing could be tested, that is told, and is no verdict: torch may be missing on the node.
        """
        controller = self._controller
        member = controller.fleet.members[nodes[0]]
        spec = trial(name, nodes, slots=member.slots, pool=member.pool, of=of, pair=pair)
        began = controller.health.now

        def still(job: Job) -> bool:
            waits = start_within_s is not None and job.attempt == 0
            return wanted() and not (waits and controller.health.now - began > (start_within_s or 0.0))

        job = await self._ended(await self._submitted(spec), still)
        if not wanted():
            return None
        said = await self._said(job)
        if said is None:
            return None
        judged = Judged(verdict=Verdict.UNTESTED, reason=f"no rank said a word: {job.state}, {job.reason}")
        if said:
            history = await self.history()
            judged = judge(said, nodes=tuple(nodes), ranks=spec.resources.ranks, history=history)
        if judged.verdict is Verdict.UNTESTED:
            text = f"{name}: {' and '.join(nodes)} {judged.verdict}: {judged.reason}"
            await controller.write(
                lambda writer: writer.add_event(NewEvent(kind="node trial", text=text, node=nodes[0]))
            )
        log.info("%s: %s is %s: %s", job.id, " and ".join(nodes), judged.verdict, judged.reason)
        return Came(job=job.id, judged=judged)

    async def failed_job(self, job: str | None) -> JobSpec | None:
        """The spec of a job that had a node when it went out."""
        if job is None:
            return None
        with suppress(KeepstepError):
            row: Job = await self._controller.on_store(self._controller.store.job, job)
            return from_dict(row.spec)
        return None

    async def history(self) -> list[Kept]:
        """What validations measured, of all nodes, the oldest first."""
        rows = await self._controller.on_store(self._controller.store.validations, limit=_HISTORY_MAX)
        return [one for row in reversed(rows) for one in _kept(row.figures)]

    async def _submitted(self, spec: JobSpec) -> Job:
        controller = self._controller
        known = await controller.on_store(controller.store.jobs, name=spec.name, limit=1)
        if known.items:
            return known.items[0]
        job = await controller.write(lambda writer: enter(writer, spec, who=_WHO, project=_WHO))
        await controller.refresh(job.id)
        controller.wake()
        return job

    async def _ended(self, job: Job, still: Callable[[Job], bool]) -> Job:
        controller = self._controller
        while job.finished_at is None:
            told = controller.told
            if job.wanted != "cancel" and not still(job):
                await self._cancel(job)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await told.wait()
            job = await controller.on_store(controller.store.job, job.id)
        return job

    async def _cancel(self, job: Job) -> None:
        def write(writer: Writer) -> None:
            reason = "is not waited for any more"
            writer.update_job(job.id, wanted="cancel", wanted_by=_WHO, wanted_reason=reason)

        await self._controller.write(write, about=job.id)

    async def _said(self, job: Job) -> list[Result] | None:
        """Of all ranks, as far as their nodes answer. None: none does, so nobody knows what they said."""
        if not job.attempt:
            return []
        row: AttemptRow = await self._controller.on_store(self._controller.store.attempt, job.id, job.attempt)
        told = await asyncio.gather(*(self._lines(row, node) for node in row.nodes))
        if all(lines is None for lines in told):
            return None
        return [result for lines in told for result in results(lines or [])]

    async def _lines(self, row: AttemptRow, node: Node) -> list[str] | None:
        params: dict[str, Any] = {
            "job": row.job, "attempt": row.number, "grep": re.escape(MARK), "max_bytes": _LOGS_BYTES,
        }  # fmt: skip
        lines: list[str] = []
        try:
            while True:
                answer = await self._controller.fleet.ask(
                    node, "logs", params, term=self._controller.store.term, within_s=_LOGS_WITHIN_S
                )
                lines += [line for _, line in answer["lines"]]
                params["after"] = answer["after"]
                if not answer.get("more", False):
                    return lines
        except KeepstepError as problem:
            log.warning("what %s says of %s cannot be read: %s", row.job, node, problem)
            return lines or None


def figures(*came: Came | None) -> dict[str, Any]:
    """For the store, as `history` reads it."""
    kept = [one.judged.kept for one in came if one is not None and one.judged.kept is not None]
    return {"kept": msgspec.to_builtins(kept)}


def _kept(stored: Mapping[str, Any]) -> list[Kept]:
    """What another version wrote otherwise is no history."""
    try:
        return msgspec.convert(stored.get("kept") or [], list[Kept])
    except msgspec.ValidationError:
        return []
