"""A job's shipped work folder on this node: fetched by its digest, checked, unpacked once per job.

The archive is kept under its digest for other jobs; the unpacked folder is the job's own, since scripts write
beside themselves and expect to find it again in the next attempt.
"""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from keepstep.agent.endpoint import Endpoint, download
from keepstep.agent.folder import Folder
from keepstep.core import bundles, durable
from keepstep.core.clock import Clock
from keepstep.core.errors import InputError, KeepstepError, Unreachable

_BYTES_MAX = 1 << 30
_READ_TIMEOUT_S = 60.0
_RETRY_S = 1.0


class Work:
    def __init__(self, folder: Folder, *, clock: Clock, endpoint: Callable[[], Endpoint | None]) -> None:
        self._folder, self._clock, self._endpoint = folder, clock, endpoint
        self._locks: dict[str, asyncio.Lock] = {}

    async def folder_for(self, job: str, sha256: str, *, within_s: float) -> Path:
        """The unpacked folder. Errors: InputError for an archive that is not as it should be, Unreachable."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise InputError(f"{sha256!r} is no digest of a bundle")
        target = self._folder.job(job) / f"workdir-{sha256[:16]}"
        async with self._locks.setdefault(sha256, asyncio.Lock()):
            if not target.is_dir():
                archive = await self._archive(sha256, within_s)
                await asyncio.to_thread(_unpack, archive, target, sha256)
        return target

    async def _archive(self, sha256: str, within_s: float) -> Path:
        path = self._folder.bundles / f"{sha256}.tar"
        deadline = self._clock.monotonic() + within_s
        while not path.exists():
            endpoint = self._endpoint()
            try:
                if endpoint is None:
                    raise Unreachable("no controller to fetch the bundle from")
                await asyncio.to_thread(_fetch, endpoint, sha256, path)
            except Unreachable:
                if self._clock.monotonic() > deadline:
                    raise
                await asyncio.sleep(_RETRY_S)
        return path


def _fetch(endpoint: Endpoint, sha256: str, path: Path) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        download(
            endpoint, f"/api/v1/bundles/{sha256}", beside, bytes_max=_BYTES_MAX, timeout_s=_READ_TIMEOUT_S
        )
        found = bundles.digest(beside)
        if found != sha256:
            raise InputError(f"the bundle's digest is {found}, not {sha256}", where=endpoint.url)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


def _unpack(archive: Path, target: Path, sha256: str) -> None:
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        bundles.extract(archive, beside, sha256=sha256)
        beside.rename(target)
        durable.sync_folder(target.parent)
    except KeepstepError:
        archive.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
