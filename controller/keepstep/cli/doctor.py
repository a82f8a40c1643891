"""keepstep doctor: is this machine fit, and is the controller well?"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from keepstep.cli import units
from keepstep.cli.client import Client
from keepstep.cli.context import chosen
from keepstep.cli.options import Output
from keepstep.cli.rayed import RayAddress, RayOptions, RayResource, RayUrl
from keepstep.cli.render import Column, draw, emit
from keepstep.core.errors import InputError, KeepstepError
from keepstep.core.home import Home, find_home, running_controller

app = typer.Typer(rich_markup_mode=None)

_DISK_BYTES_MIN = 2 << 30
_FILES_MIN = 4096

T = TypeVar("T")
_NETWORK_DISKS = frozenset(("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "lustre", "beegfs"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    what: str
    state: str  # ready | silent (worth a look) | failed
    told: str


COLUMNS = (
    Column("CHECK", lambda row: str(row["what"])),
    Column("STATE", lambda row: {"ready": "ok", "silent": "look"}.get(row["state"], "failed"), state=True),
    Column("FOUND", lambda row: str(row["told"])),
)


@app.command("doctor")
def doctor(
    ctx: typer.Context,
    *,
    pool: Annotated[str, typer.Option("--pool", help="A pool to look at, too: ray.")] = "",
    ray: RayAddress = "",
    ray_resource: RayResource = "GPU",
    ray_url: RayUrl = "",
    output: Output = "table",
) -> None:
    """Check this machine and the controller. Exit code 1 if something is broken."""
    context = (ctx.find_root().obj or {}).get("context", "")
    if pool not in {"", "ray"}:
        raise InputError(
            f"there is nothing to be checked of a pool {pool!r}", where="--pool", next="Try: ray."
        )
    findings = list(examine(find_home(), context))
    if pool or ray:
        running = running_controller(find_home())
        asked = RayOptions(
            address=ray or "auto", resource=ray_resource, url=ray_url or (running.url if running else "")
        )
        findings += [Finding(**found) for found in asked.checkup()]
    rows = [{"what": found.what, "state": found.state, "told": found.told} for found in findings]
    emit(
        output,
        {"checks": rows},
        name=lambda: [row["what"] for row in rows if row["state"] == "failed"],
        table=lambda wide: draw(rows, COLUMNS, wide=wide),
    )
    if any(found.state == "failed" for found in findings):
        raise typer.Exit(1)


def examine(home: Home, context: str) -> Iterator[Finding]:
    yield _finding("python", sys.version_info >= (3, 11), sys.version.split()[0])
    yield _finding("linux", sys.platform == "linux", f"{os.uname().sysname} {os.uname().release}")
    yield _memfd()
    yield _files()
    yield _disk(home)
    yield _torch()
    yield _gpus()
    yield from _controller(home, context)


def _finding(what: str, good: bool, told: str, otherwise: str = "failed") -> Finding:
    return Finding(what=what, state="ready" if good else otherwise, told=told)


def _memfd() -> Finding:
    try:
        os.close(os.memfd_create("keepstep-doctor", os.MFD_CLOEXEC))
    except OSError as error:
        return Finding(what="beacon pages", state="failed", told=f"memfd_create: {error.strerror}")
    return Finding(what="beacon pages", state="ready", told="memfd_create works")


def _files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _finding("open files", hard >= _FILES_MIN, f"{soft} now, {hard} at most", "silent")


def _disk(home: Home) -> Finding:
    place = home.path
    while not place.exists():
        place = place.parent
    kind = _file_system(place)
    free = shutil.disk_usage(place).free
    told = f"{home.path} on {kind}, {units.size(free)} free"
    if kind in _NETWORK_DISKS:
        return Finding(what="state folder", state="failed", told=f"{told}: SQLite needs a local disk")
    if not os.access(place, os.W_OK):
        return Finding(what="state folder", state="failed", told=f"{told}: not writable")
    return _finding("state folder", free >= _DISK_BYTES_MIN, told, "silent")


def _file_system(path: Path) -> str:
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split()
        inside = path == Path(mount) or Path(mount) in path.parents
        if inside and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def _torch() -> Finding:
    try:
        found = version("torch")
    except PackageNotFoundError:
        return Finding(
            what="torch", state="silent", told="not installed: no built-in trainer, no warm starts"
        )
    return Finding(what="torch", state="ready", told=found)


def _gpus() -> Finding:
    count = sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia[0-9]*"))
    return Finding(
        what="GPUs",
        state="ready",
        told=str(count) if count else f"none: slots are processes on {os.cpu_count()} processors",
    )


def _controller(home: Home, context: str) -> Iterator[Finding]:
    chosen_context = _kept(lambda: chosen(context))
    if isinstance(chosen_context, KeepstepError):
        yield Finding(what="controller", state="failed", told=str(chosen_context).splitlines()[0])
        return
    running = running_controller(home)
    if chosen_context is not None:
        client = Client(url=chosen_context.url, token=chosen_context.token, name=chosen_context.name)
    elif running is not None:
        client = Client(url=running.url, token=running.token)
    else:
        left = home.controller_file.exists()
        told = "not running (one was, and did not end well)" if left else "not running"
        yield Finding(what="controller", state="silent", told=f"{told}: `keepstep up` starts one")
        return
    info = _kept(lambda: client.get("/info"))
    if isinstance(info, KeepstepError):
        yield Finding(what="controller", state="failed", told=str(info).splitlines()[0])
        return
    same = info.get("version") == version("keepstep")
    told = f"{client.url}, version {info.get('version')}, term {info.get('term')}, {info.get('store')}"
    yield _finding("controller", same, told if same else f"{told}; this is {version('keepstep')}", "silent")
    nodes = client.get("/nodes")["nodes"]
    away = [node["name"] for node in nodes if node["state"] not in ("ready", "gone")]
    told = f"{len(nodes) - len(away)} of {len(nodes)} ready" + (
        f"; not: {', '.join(away[:8])}" if away else ""
    )
    yield _finding("nodes", not away, told, "silent")


def _kept(ask: Callable[[], T]) -> T | KeepstepError:
    """A finding is made of an error, too."""
    try:
        return ask()
    except KeepstepError as error:
        return error
