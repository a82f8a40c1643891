"""A close look at all ranks of an attempt: every agent is asked at once, and who does not answer is named."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from keepstep.control.book import Entry
from keepstep.control.fleet import Fleet
from keepstep.core.errors import KeepstepError
from keepstep.core.ids import Attempt, JobId, Node, Rank
from keepstep.decide.plan import Examine
from keepstep.decide.view import Connected, Examined, Finding, Recorded

log = logging.getLogger(__name__)


async def examine(fleet: Fleet, entry: Entry, look: Examine, *, term: int, told: Callable[[], None]) -> None:
    """What a decision asked for; the next one finds it in its view."""
    log.info("%s: %s", look.job, look.reason)
    try:
        found = await closely(
            fleet, look.job, look.attempt, look.nodes, term=term, within_s=look.within_s, stacks=look.stacks
        )
        if entry.job.attempt == look.attempt:
            entry.examined.append((fleet.time.now, found))
    finally:
        entry.examining = False
        told()


async def closely(
    fleet: Fleet,
    job: JobId,
    attempt: Attempt,
    nodes: Iterable[Node],
    *,
    term: int,
    within_s: float,
    stacks: bool = True,
) -> Examined:
    """Process states, connections, and with `stacks` stacks and flight recorders, as far as each node can
    tell within `within_s`."""
    asked = list(nodes)
    params = {"job": job, "attempt": attempt, "stacks": stacks}
    answers = await asyncio.gather(
        *(fleet.ask(node, "evidence", params, term=term, within_s=within_s) for node in asked),
        return_exceptions=True,
    )
    findings: list[Finding] = []
    errors: list[str] = []
    for node, answer in zip(asked, answers, strict=True):
        if isinstance(answer, KeepstepError):
            errors.append(f"{node} could not be looked at closely: {answer}")
        elif isinstance(answer, BaseException):
            raise answer
        else:
            try:
                findings += [_finding(rank) for rank in answer["ranks"]]
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                errors.append(f"{node} answered what is no evidence: {error!r}")
    return Examined(
        attempt=attempt,
        age_s=0.0,
        stacks=stacks,
        findings=tuple(sorted(findings, key=lambda finding: finding.rank)),
        errors=tuple(errors),
    )


def _finding(told: Mapping[str, Any]) -> Finding:
    """As an agent tells it; what it could not find out is missing or empty."""
    return Finding(
        rank=Rank(told["rank"]),
        process=told.get("process") or "",
        kernel=told.get("wchan") or "",
        interpreter=told.get("interpreter") or "",
        stack=tuple(told.get("stack") or ()),
        groups=tuple(
            Recorded(
                name=str(group.get("name") or ""),
                ranks=tuple(Rank(rank) for rank in group.get("ranks") or ()),
                enqueued=int(group.get("enqueued") or 0),
                completed=int(group.get("completed") or 0),
                op=str(group.get("op") or ""),
            )
            for group in told.get("groups") or ()
        ),
        links=tuple(
            Connected(
                local=str(link.get("local") or ""),
                peer=str(link.get("peer") or ""),
                rtt_s=float(link.get("rtt_s") or 0.0),
                rtt_least_s=float(link.get("rtt_least_s") or 0.0),
                unanswered_s=float(link.get("unanswered_s") or 0.0),
                resent=float(link.get("resent") or 0.0),
            )
            for link in told.get("links") or ()
        ),
        error=told.get("error") or "",
    )
