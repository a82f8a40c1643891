"""The service itself over REST: what it is, its tokens, its bundles, its end."""

import asyncio
import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import FileResponse

from keepstep.api.agents import AnyToken
from keepstep.api.auth import Admin, Control, Submitter, Viewer
from keepstep.core.clock import Clock
from keepstep.core.errors import InputError, NotFound, Refused, Unauthorized
from keepstep.store.rows import Role

router = APIRouter()


@dataclass(slots=True, kw_only=True)
class Service:
    """What the routes need to know of the process around them."""

    version: str
    url: str
    home: Path
    stop: Callable[[], None]  # begin to end
    clock: Clock
    started_at: float = field(init=False)
    asked_at: float = field(init=False)  # of the last request
    stop_agents: bool = False

    def __post_init__(self) -> None:
        self.started_at = self.asked_at = self.clock.monotonic()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.get("/info", tags=["service"])
async def info(request: Request, control: Control, who: Viewer) -> dict[str, Any]:
    service = _service(request)
    return {
        "version": service.version,
        "url": service.url,
        "term": control.store.term,
        "store": control.store.name,
        "pid": os.getpid(),
        "pools": sorted(control.pools),
        "uptime_s": round(service.clock.monotonic() - service.started_at, 1),
        "principal": who.name,
    }


@router.post("/service/stop", tags=["service"])
async def stop(
    request: Request, control: Control, who: Admin, force: Annotated[bool, Body(embed=True)] = False
) -> dict[str, Any]:
    """End the controller and the agents of its local pool."""
    running = [entry.job.id for entry in control.book.entries.values() if entry.present is not None]
    if running and not force:
        raise Refused(
            "1 job is running" if len(running) == 1 else f"{len(running)} jobs are running",
            why=", ".join(sorted(running)[:5]),
            next="Cancel them first, or `keepstep down --force` ends them.",
        )
    service = _service(request)
    service.stop_agents = True
    asyncio.get_running_loop().call_soon(service.stop)
    return {"stopping": True, "jobs": running}


@router.post("/tokens", status_code=201, tags=["tokens"])
async def create_token(
    control: Control,
    who: Admin,
    name: Annotated[str, Body()],
    role: Annotated[Role | None, Body()] = None,
    join: Annotated[bool, Body()] = False,
    project: Annotated[str, Body()] = "default",
    ttl_s: Annotated[float | None, Body(gt=0)] = None,
    uses: Annotated[int | None, Body(gt=0)] = None,
) -> dict[str, Any]:
    """A new token. Its secret is in this answer and nowhere else."""
    if join == (role is not None):
        raise InputError("a token is either for people (`role`) or for nodes (`join`)")
    issued = await control.on_store(
        control.store.tokens.issue,
        name=name,
        role=role,
        kind="join" if join else "user",
        principal=name,
        project=project,
        ttl_s=ttl_s,
        uses=uses,
    )
    return {"secret": issued.secret, "token": asdict(issued.token)}


@router.get("/tokens", tags=["tokens"])
async def tokens(control: Control, who: Admin) -> dict[str, Any]:
    return {"tokens": [asdict(token) for token in await control.on_store(control.store.tokens.list)]}


@router.delete("/tokens/{ref}", tags=["tokens"])
async def revoke(control: Control, who: Admin, ref: str) -> dict[str, Any]:
    revoked = await control.on_store(control.store.tokens.revoke, ref)
    return {"revoked": [asdict(token) for token in revoked]}


@router.put("/bundles/{sha256}", status_code=201, tags=["bundles"])
async def put_bundle(request: Request, who: Submitter, sha256: str) -> dict[str, Any]:
    """Take code in, under the hash of its content. Taking the same twice is one bundle."""
    target = _bundle(request, sha256)
    handle, name = await asyncio.to_thread(_temporary, target.parent)
    digest, size = hashlib.sha256(), 0
    try:
        with os.fdopen(handle, "wb") as file:
            async for chunk in request.stream():
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != sha256:
            raise InputError("the bundle's content does not have the hash it was sent under", where=sha256)
        await asyncio.to_thread(name.replace, target)
    finally:
        await asyncio.to_thread(name.unlink, missing_ok=True)
    return {"sha256": sha256, "bytes": size}


def _temporary(folder: Path) -> tuple[int, Path]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder)
    return handle, Path(name)


@router.head("/bundles/{sha256}", include_in_schema=False)
@router.get("/bundles/{sha256}", tags=["bundles"])
async def get_bundle(request: Request, token: AnyToken, sha256: str) -> FileResponse:
    if token.kind != "agent" and not token.allows("viewer"):
        raise Unauthorized("this token may not read bundles")
    path = _bundle(request, sha256)
    if not path.exists():
        raise NotFound(f"there is no bundle {sha256}", next="Submit the job again: it ships its code anew.")
    return FileResponse(path, media_type="application/gzip")


def _bundle(request: Request, sha256: str) -> Path:
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise InputError(f"{sha256!r} is not a SHA-256 in hexadecimal")
    return _service(request).home / "bundles" / f"{sha256}.tar.gz"
