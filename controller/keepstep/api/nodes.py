"""Nodes over REST."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body

from keepstep.api.auth import Control, Operator, Viewer
from keepstep.control import requests
from keepstep.control.desired import unfinished_nodes
from keepstep.control.loop import Controller
from keepstep.core.errors import NotFound
from keepstep.store.rows import NodeRow

router = APIRouter(prefix="/nodes", tags=["nodes"])


@router.get("")
async def nodes(control: Control, who: Viewer) -> dict[str, Any]:
    rows = await control.on_store(control.store.nodes)
    # The agent of a `keepstep run` that is over is nobody's node any more.
    there = [row for row in rows if not (row.pool == "run" and row.state in {"gone", "lost"})]
    return {"nodes": [_told(control, row) for row in there]}


@router.get("/{name}")
async def node(control: Control, who: Viewer, name: str) -> dict[str, Any]:
    rows = await control.on_store(control.store.nodes)
    row = next((row for row in rows if row.name == name), None)
    if row is None:
        raise NotFound(f"there is no node {name!r}", next="`keepstep node list` shows those that there are.")
    return _told(control, row)


@router.post("/{name}/{verb}")
async def mark(
    control: Control, who: Operator, name: str, verb: str, reason: Annotated[str, Body(embed=True)] = ""
) -> dict[str, Any]:
    """cordon, uncordon, confirm-lost"""
    if verb not in {"cordon", "uncordon", "confirm-lost"}:
        raise NotFound(f"a node cannot be asked to {verb!r}", next="It can: cordon, uncordon, confirm-lost.")
    await requests.mark_node(control, name, verb, who, reason)
    return await node(control, who, name)


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
    return {**asdict(row), "busy": row.name in busy, **live}
