"""Nodes over REST: what they are, how they stand as hardware, and what people ask of them."""

import secrets
from dataclasses import asdict
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Body, Query

from keepstep.api.auth import Control, Operator, Viewer
from keepstep.control import requests
from keepstep.control.desired import unfinished_nodes
from keepstep.control.health import Validation
from keepstep.control.loop import Controller
from keepstep.control.validations import Screening
from keepstep.core.errors import InputError, NotFound
from keepstep.core.rules import TriagePolicy
from keepstep.core.states import WORKING
from keepstep.decide.asked import VERBS, Wish
from keepstep.decide.life import Life, lemon, lemon_by_week
from keepstep.decide.screen import told
from keepstep.store.rows import NodeRow

router = APIRouter(prefix="/nodes", tags=["nodes"])
policies = APIRouter(prefix="/health", tags=["nodes"])

_LEMON_WEEKS = 8
_DRAIN_MAX_S = 30 * 86_400.0


@router.get("")
async def nodes(control: Control, who: Viewer) -> dict[str, Any]:
    rows = await control.on_store(control.store.nodes)
    # The agent of a `keepstep run` that is over is nobody's node any more.
    there = [row for row in rows if not (row.pool == "run" and row.state in {"gone", "lost"})]
    return {"nodes": [_told(control, row) for row in there]}


@router.get("/{name}")
async def node(control: Control, who: Viewer, name: str) -> dict[str, Any]:
    """With everything that is remembered of its life."""
    row = await _row(control, name)
    return {**_told(control, row), "health": _health(control, row), "history": _history(control, row)}


@router.get("/{name}/history")
async def history(
    control: Control,
    who: Viewer,
    name: str,
    after: int = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> dict[str, Any]:
    """What happened to it, oldest first, and what its validations came to."""
    row = await _row(control, name)
    page = await control.on_store(control.store.events, after=after, node=row.name, limit=limit)
    validations = await control.on_store(control.store.validations, row.name)
    return {
        "events": [asdict(event) for event in page.items],
        "next": page.next,
        "validations": [asdict(one) for one in validations],
        "lemon": _lemon(control, control.health.ward.life(row.name)),
    }


@router.post("/{name}/validated")
async def validated(
    control: Control,
    who: Operator,
    name: str,
    passed: Annotated[bool, Body()],
    reason: Annotated[str, Body()] = "",
) -> dict[str, Any]:
    """What a validation came to that somebody made by hand."""
    row = await _row(control, name)
    came = Validation(passed=passed, text=reason)
    await control.health.validation(control.fleet, row.name, came, control.write, who.name)
    return await node(control, who, name)


@router.post("/{name}/{verb}")
async def ask(
    control: Control,
    who: Operator,
    name: str,
    verb: str,
    reason: Annotated[str, Body()] = "",
    deadline_s: Annotated[float | None, Body(ge=0, le=_DRAIN_MAX_S)] = None,
    revision: Annotated[int | None, Body()] = None,
) -> dict[str, Any]:
    """cordon, drain, uncordon, validate, note, confirm-lost. `revision`: of the life that was looked at."""
    if verb == "confirm-lost":
        await requests.confirm_lost(control, name, who, reason)
    elif verb in VERBS:
        if verb == "note" and not reason:
            raise InputError("a note needs a text")
        wish = Wish(verb=verb, who=who.name, reason=reason, deadline_s=deadline_s, revision=revision)
        await control.health.ask(control.fleet, name, wish, control.write)
    else:
        known = ", ".join((*VERBS, "confirm-lost"))
        raise NotFound(f"a node cannot be asked to {verb!r}", next=f"It can: {known}.")
    return await node(control, who, name)


@policies.get("/policy")
async def policy(control: Control, who: Viewer) -> dict[str, Any]:
    return _policy(control.health.policy)


@policies.post("/screening", status_code=202)
async def screen(
    control: Control, who: Operator, nodes: Annotated[list[str] | None, Body(embed=True)] = None
) -> dict[str, Any]:
    """Try nodes by pairs until the sick ones are known; None: all idle ones."""
    began = control.validations.screen(nodes or (), secrets.token_hex(4), who.name)
    return _screening(began)


@policies.get("/screening")
async def screening(control: Control, who: Viewer) -> dict[str, Any]:
    """The one under way, or the last one of this controller."""
    if control.validations.screening is None:
        raise NotFound("nothing was screened by this controller", next="`keepstep node screen` begins.")
    return _screening(control.validations.screening)


def _screening(one: Screening) -> dict[str, Any]:
    found = one.found
    groups = (("good", found.good), ("sick", found.sick), ("unknown", found.open))
    results = {name: result for result, names in groups for name in names}
    return {
        "id": one.number,
        "done": one.done,
        "problem": one.problem,
        "rounds": len(one.rounds),
        "rounds_max": one.rounds_max,
        "nodes": [
            {"name": name, "result": results[name], "text": told(one.nodes, one.rounds, one.reasons, name)}
            for name in one.nodes
        ],
        "links": [[pair.a, pair.b] for pair in sorted(found.links)],
    }


@policies.post("/policy/reload")
async def reload(control: Control, who: Operator) -> dict[str, Any]:
    """Read the policy's file anew. Refused with every line that is wrong, and the old one stays in force."""
    return _policy(await control.reload_policy(who.name))


def _policy(found: TriagePolicy) -> dict[str, Any]:
    return {"source": found.source, "policy": msgspec.to_builtins(found)}


async def _row(control: Controller, name: str) -> NodeRow:
    rows = await control.on_store(control.store.nodes)
    row = next((row for row in rows if row.name == name), None)
    if row is None:
        raise NotFound(f"there is no node {name!r}", next="`keepstep node list` shows those that there are.")
    return row


def _told(control: Controller, row: NodeRow) -> dict[str, Any]:
    member = control.fleet.members.get(row.name)
    busy = unfinished_nodes(control.book.entries.values())
    live: dict[str, Any] = {"connected": False}
    if member is not None:
        live = {
            "state": member.state,
            "connected": member.talks(control.time),
            "silence_s": round(control.time.age(member.heard_at), 1),
            "load": member.node.load,
            "memory_available_bytes": member.node.memory_available_bytes,
            "memory_total_bytes": member.node.memory_total_bytes,
            "agent_memory_bytes": member.node.agent_memory_bytes,
            "pid": member.register.pid if member.register else None,
            "standbys": [
                {"job": s.job, "state": s.state, "memory_bytes": s.memory_bytes} for s in member.standbys
            ],
            "attempts": [
                {"job": job, "attempt": attempt, "phase": member.attempts[job, attempt].status.phase}
                for job, attempt in sorted(member.current)
            ],
        }
    life = control.health.ward.life(row.name)
    return {**asdict(row), "busy": row.name in busy, **live, **_life(control, life)}


def _life(control: Controller, life: Life) -> dict[str, Any]:
    now = control.health.now
    return {
        "life": life.state,
        "life_owner": life.owner if life.state not in WORKING else "",
        "life_reason": life.reason,
        "life_for_s": round(now - life.since, 1) if life.revision else None,
        "life_due_s": None if life.due is None else round(max(0.0, life.due - now), 1),
        "revision": life.revision,
        "cordoned": life.state not in WORKING,
        "lemon_score": round(lemon(life.entries, now, control.health.policy.lemon), 2),
    }


def _lemon(control: Controller, life: Life) -> dict[str, Any]:
    """How much it has cost of late. `weeks`: at the end of each, this one last."""
    rule = control.health.policy.lemon
    weeks = lemon_by_week(life.entries, control.health.now, rule, _LEMON_WEEKS)
    return {"weeks": [round(score, 2) for score in weeks], "replace_at": rule.replace_at}


def _history(control: Controller, row: NodeRow) -> dict[str, Any]:
    life, now = control.health.ward.life(row.name), control.health.now
    return {
        "needs": [
            {"rule": n.rule, "action": n.action, "reason": n.reason, "blamed": n.blamed} for n in life.needs
        ],
        "entries": [
            {**msgspec.to_builtins(one), "age_s": round(now - one.at, 1)} for one in life.entries[-50:]
        ],
        "repairs": [{**msgspec.to_builtins(one), "age_s": round(now - one.at, 1)} for one in life.repairs],
        "notes": [{"by": n.by, "text": n.text, "age_s": round(now - n.at, 1)} for n in life.notes],
    }


def _health(control: Controller, row: NodeRow) -> Any:
    """What its agent says now; None: it has no probes, or is not there."""
    member = control.fleet.members.get(row.name)
    return None if member is None or member.health is None else msgspec.to_builtins(member.health)
