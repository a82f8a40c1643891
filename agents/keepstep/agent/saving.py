"""A state that is in memory becomes a checkpoint: each node writes what it holds, one of them completes it.

save  stage: write    job, dir, at, ranks, world, lineage, within_s -> {complete} or {files, about}
             seal     job, dir, at, after, layout, files, about, keep -> {complete: true}
             discard  dir, at -> {}

`dir` is the job's folder, `at` (attempt, step) names the checkpoint in it, and `after` is the newest attempt
that the controller knows of: a folder that a later one has taken over is left alone. A manifest that is
there already is the end of it, whoever wrote it. `keep`: of a script's states so many, the newest; None: the
built-in trainer sees to it.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from keepstep.agent.carriers import Carriers
from keepstep.core import checkpoints, slotfile
from keepstep.core.checkpoints import MANIFEST, Point
from keepstep.core.errors import InputError, Refused
from keepstep.core.ids import Attempt, Step
from keepstep.core.manifest import SLOTS, File, Manifest


async def save(params: Mapping[str, Any], carriers: Carriers) -> dict[str, Any]:
    """Errors: InputError, Refused, Unreachable (no carrier), OSError (the storage)."""
    attempt, step = (int(number) for number in params["at"])
    at = Point(step=Step(step), attempt=Attempt(attempt))
    name = str(params["dir"])
    if "://" in name:
        raise InputError(
            "snapshots are stored in folders only", where=name, next="Set checkpoint.dir to a path."
        )
    folder = Path(name) / checkpoints.folder_name(at)
    complete = await asyncio.to_thread((folder / MANIFEST).is_file)
    match params["stage"]:
        case "discard":
            if not complete:
                await asyncio.to_thread(_discard, folder)
            return {}
        case _ if complete:
            return {"complete": True}
        case "write":
            request = {name: params[name] for name in ("at", "ranks", "world", "lineage")}
            within_s = float(params["within_s"])
            return await carriers.save(str(params["job"]), {"dir": str(folder), **request}, within_s=within_s)
        case "seal":
            await asyncio.to_thread(_seal, folder, at, params)
            return {"complete": True}
        case other:
            raise InputError(f"this agent knows no stage {other!r} of saving")


def _seal(folder: Path, at: Point, params: Mapping[str, Any]) -> None:
    fence = checkpoints.read_fence(folder.parent)
    if fence is not None and fence > int(params["after"]):
        raise Refused(f"attempt {fence} has taken over", where=str(folder.parent))
    files = {
        str(name): File(bytes=int(size), xxh3=str(sum_)) for name, (size, sum_) in params["files"].items()
    }
    for name, file in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise Refused(f"{name} is not what was written", where=str(folder))
    slotfile.sync(folder)
    about = params["about"]
    values = about.get("values") or {}
    manifest = Manifest(
        job=str(params["job"]), attempt=at.attempt, step=at.step, layout=dict(params["layout"]),
        model=about.get("model") or {}, tokens=int(values.get("tokens") or 0), files=files,
        data=values.get("data") or {}, torch=str(about.get("torch") or ""), form=SLOTS,
    )  # fmt: skip
    manifest.write(folder)
    if params.get("keep"):
        _retain(folder.parent, at, int(params["keep"]))


def _retain(folder: Path, newest: Point, keep: int) -> None:
    """Older states that were stored from memory; whatever else is there is somebody else's."""
    older = [one.at for one in checkpoints.inventory(folder) if one.complete and one.at <= newest]
    for at in sorted(older, reverse=True)[keep:]:
        path = folder / checkpoints.folder_name(at)
        if Manifest.read(path).form == SLOTS:
            (path / MANIFEST).unlink(missing_ok=True)
            _discard(path)


def _discard(folder: Path) -> None:
    """Room on a full disk, and nothing that looks like a checkpoint. What else is in the folder stays."""
    for path in (*folder.glob(f"rank-*{slotfile.SUFFIX}"), *folder.glob(f".rank-*{slotfile.SUFFIX}.*")):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
