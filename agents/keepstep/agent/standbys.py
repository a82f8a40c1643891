"""The node's standby servers: for jobs that run here, and for those it may have to take over."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from keepstep.agent.folder import Folder
from keepstep.agent.preparation import Recipe
from keepstep.agent.standby import StandbyServer, key_of
from keepstep.core.errors import KeepstepError
from keepstep.wire.messages import StandbyStatus

_log = logging.getLogger("keepstep.agent")
_LOAD_TIMEOUT_S = 180.0  # torch and friends from a cold network disk
_STOP_TIMEOUT_S = 10.0


@dataclass(slots=True)
class _Held:
    server: StandbyServer
    state: str = "loading"
    memory_bytes: int = 0
    reason: str = ""


class Standbys:
    def __init__(
        self, folder: Folder, *, changed: Callable[[], None], tell: Callable[[str, str, str], None]
    ) -> None:
        self._folder, self._changed = folder, changed
        self._tell = tell  # kind of event, job, text
        self._held: dict[tuple[str, str], _Held] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}

    async def ready(self, job: str, recipe: Recipe) -> tuple[StandbyServer | None, str]:
        """A loaded server for a job, found or started; or None and why ranks start cold."""
        if not recipe.modules:
            return None, recipe.cold_reason
        env = recipe.standby_env
        key = job, key_of(recipe.interpreter, env, recipe.modules)
        async with self._locks.setdefault(key, asyncio.Lock()):
            held = self._held.get(key)
            if held is None:
                server = StandbyServer(
                    self._folder.standbys / "-".join(key), interpreter=recipe.interpreter, env=env,
                    cwd=str(recipe.cwd), modules=recipe.modules,
                )  # fmt: skip
                held = self._held[key] = _Held(server)
                self._changed()
            return await self._ensure(job, held)

    async def _ensure(self, job: str, held: _Held) -> tuple[StandbyServer | None, str]:
        before = held.state
        try:
            state = await held.server.ensure(timeout_s=_LOAD_TIMEOUT_S)
        except KeepstepError as error:
            held.state, held.reason = "broken", str(error)
            if before != "broken":
                self._tell("standby_broken", job, f"ranks start cold: {held.reason}")
                self._changed()
            return None, held.reason
        held.state, held.memory_bytes, held.reason = "ready", state.pss_bytes, ""
        if before != "ready":
            self._tell("standby_ready", job, f"a standby server is loaded after {state.load_s:.1f} s")
            self._changed()
        return held.server, ""

    def statuses(self) -> tuple[StandbyStatus, ...]:
        return tuple(
            StandbyStatus(job=job, state=held.state, memory_bytes=held.memory_bytes)
            for (job, _), held in sorted(self._held.items())
        )

    async def end_all(self) -> None:
        """End every server of this node, also those that an earlier agent started."""
        await self.release(())
        for directory in self._folder.standbys.glob("*"):
            found = StandbyServer(directory, interpreter=(), env={}, cwd="/", modules=())
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await found.stop()
            except (KeepstepError, TimeoutError) as error:
                _log.warning("the standby server in %s does not stop: %s", directory.name, error)

    async def release(self, wanted: Iterable[str]) -> None:
        """End the servers of jobs that nothing here needs any more; living shims and ranks go on."""
        keep = frozenset(wanted)
        for key in [key for key in self._held if key[0] not in keep]:
            held = self._held.pop(key)
            self._changed()
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await held.server.stop()
            except (KeepstepError, TimeoutError) as error:
                _log.warning("the standby server of %s does not stop: %s", key[0], error)
