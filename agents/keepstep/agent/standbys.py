"""The node's standby servers: for jobs that run here, and for those it may have to take over.

A server belongs to a key (interpreter, environment, modules), not to a job: jobs that would load the same
share one. What nobody needs any more is kept for a while, since the same is often started again.

What a script imports is learnt while it runs. The server that knows more is loaded beside the present one,
which serves until the other is ready. It serves only where the script sets nothing too late for it.
"""

import asyncio
import logging
import shutil
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keepstep.agent.folder import Folder
from keepstep.agent.learnt import Learnt, accounts
from keepstep.agent.preparation import Recipe
from keepstep.agent.rank.become import contradiction
from keepstep.agent.rank.preload import Wanted
from keepstep.agent.standby import StandbyServer, key_of
from keepstep.core.errors import KeepstepError, Refused
from keepstep.wire.messages import StandbyStatus

_log = logging.getLogger("keepstep.agent")
_LOAD_TIMEOUT_S = 180.0  # torch and friends from a cold network disk
_STOP_TIMEOUT_S = 10.0


@dataclass(slots=True)
class _Held:
    server: StandbyServer
    jobs: set[str] = field(default_factory=set)
    state: str = "loading"
    memory_bytes: int = 0
    reason: str = ""
    one: asyncio.Lock = field(default_factory=asyncio.Lock)
    farewell: asyncio.TimerHandle | None = None  # nobody needs it any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One attempt's part of the node."""

    ranks: int
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """Ranks become of processes that are started ahead, because what has touched a GPU is not forked from."""

    ranks: int  # of an attempt that is not known yet
    context: bool
    gpus: tuple[str, ...]


class Standbys:
    """`linger_s`: for how long a server without a job is kept. `bytes_max`: of all servers together."""

    def __init__(
        self, folder: Folder, *, changed: Callable[[], None], tell: Callable[[str, str, str], None],
        ahead: Ahead | None = None, linger_s: float, bytes_max: int | None,
    ) -> None:  # fmt: skip
        self._folder, self._changed = folder, changed
        self._tell = tell  # kind of event, job, text
        self._ahead, self._linger_s, self._bytes_max = ahead, linger_s, bytes_max
        self._learnt = Learnt(folder.path / "learnt")
        self._held: dict[str, _Held] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def ready(
        self, job: str, recipe: Recipe, place: Place | None = None
    ) -> tuple[StandbyServer | None, str]:
        """A loaded server for a job, found or started; or None and why ranks start cold.

        `place`: of the attempt, where there is one already.
        """
        if not recipe.modules:
            return None, recipe.cold_reason
        recipe, plain = self._wanted(recipe, place)
        known = self._learnt.of(recipe.script)
        if known.fit:
            full = self._hold(recipe, replace(plain, learnt=known.fit, tried=known.tried), known.modules)
            present = self._held.get(_key(recipe, plain))
            if full.state == "loading" and present is not None and present.state == "ready":
                if not full.one.locked():
                    self._task(self._replace(job, recipe, full, present))
                return await self._serve(job, present)
            if full.state != "broken" and await self._serves(job, recipe, full):
                return full.server, ""
        return await self._serve(job, self._hold(recipe, plain))

    def spent(self, job: str, recipe: Recipe, place: Place) -> None:
        """An attempt has taken what was started ahead for it: the next one needs another."""
        if self._ahead is not None and recipe.modules:
            self._task(self._again(job, recipe, place))

    def informed(self, recipe: Recipe) -> Recipe:
        """With what earlier runs of the script were seen to set. Reads a file."""
        late = self._learnt.of(recipe.script).sets
        unknown: dict[str, str | None] = {name: None for name in late if name not in recipe.late}
        return replace(recipe, early={**unknown, **recipe.early})

    def learn(self, job: str, recipe: Recipe | None, directory: Path, *, load: bool) -> None:
        """Take what the ranks of an attempt have told so far. `load`: and be ready for the next one."""
        if recipe is not None and recipe.modules and recipe.script:
            self._task(self._learn(job, recipe, directory, load=load))

    def statuses(self) -> tuple[StandbyStatus, ...]:
        """A server that several jobs share is told once for each, with its share of the memory."""
        return tuple(
            StandbyStatus(job=job, state=held.state, memory_bytes=held.memory_bytes // max(1, len(held.jobs)))
            for held in self._held.values()
            for job in sorted(held.jobs) or [""]
        )

    async def release(self, wanted: Iterable[str]) -> None:
        """Only these jobs still need a server here. Living shims and ranks go on."""
        keep = frozenset(wanted)
        for held in self._held.values():
            for job in held.jobs - keep:
                self._leave(job, held)

    async def end_all(self) -> None:
        """End every server of this node, also those that an earlier agent started."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(self._end(held) for held in list(self._held.values())))
        for directory in self._folder.standbys.glob("*"):
            await _stop(StandbyServer(directory, interpreter=(), env={}, cwd="/", wanted=Wanted(modules=())))

    # ---------------------------------------------------------------- one server

    def _wanted(self, recipe: Recipe, place: Place | None) -> tuple[Recipe, Wanted]:
        plain = Wanted(modules=recipe.modules, given=recipe.given)
        ahead = self._ahead
        if ahead is None:
            return recipe, plain
        ranks, gpus = (place.ranks, place.gpus) if place else (ahead.ranks, ahead.gpus)
        if ahead.context and gpus:  # a context belongs to a device
            recipe = replace(recipe, env={**recipe.env, "CUDA_VISIBLE_DEVICES": ",".join(gpus)})
        return recipe, replace(plain, ranks=ranks, context=ahead.context)

    async def _again(self, job: str, recipe: Recipe, place: Place) -> None:
        if any(job in held.jobs for held in self._held.values()):
            await self.ready(job, recipe, place)

    def _hold(self, recipe: Recipe, wanted: Wanted, learnt: Iterable[str] = ()) -> _Held:
        """`learnt`: all that is known of the script, also what turns out to be unfit when it is loaded."""
        key = _key(recipe, wanted, learnt)
        held = self._held.get(key)
        if held is None:
            server = StandbyServer(
                self._folder.standbys / key, interpreter=recipe.interpreter, env=recipe.standby_env,
                cwd=recipe.standby_cwd, wanted=wanted,
            )  # fmt: skip
            held = self._held[key] = _Held(server)
        return held

    async def _serve(self, job: str, held: _Held) -> tuple[StandbyServer | None, str]:
        """Find or load it for this job."""
        held.jobs.add(job)
        if held.farewell is not None:
            held.farewell.cancel()
            held.farewell = None
        self._changed()
        async with held.one:
            before = held.state
            try:
                await self._make_room(held)
                state = await held.server.ensure(timeout_s=_LOAD_TIMEOUT_S)
                held.memory_bytes = state.pss_bytes
                self._check_room()
            except KeepstepError as error:
                if isinstance(error, Refused):
                    await _stop(held.server)
                held.state, held.reason, held.memory_bytes = "broken", str(error), 0
                if before != "broken":
                    self._tell("standby_broken", job, f"ranks start cold: {held.reason}")
                    self._changed()
                return None, held.reason
            held.state, held.reason = "ready", ""
        if before != "ready":
            self._tell("standby_ready", job, f"a standby server is loaded after {state.load_s:.1f} s")
            self._changed()
        return held.server, ""

    async def _serves(self, job: str, recipe: Recipe, full: _Held) -> bool:
        """Whether a server with what was learnt is there and is right for this script."""
        server, _ = await self._serve(job, full)
        state = full.server.state
        if server is not None and state is not None:
            known = self._learnt.of(recipe.script)
            conflict = contradiction(recipe.early, state.reads, recipe.given)
            now = replace(known, tried=True, unfit={**known.unfit, **state.unfit}, conflict=conflict)
            if now != known:
                await asyncio.to_thread(self._learnt.keep, recipe.script, now)
            if not conflict:
                return True
            self._tell("standby_broken", job, f"what the script imports is not loaded ahead: {conflict}")
        self._leave(job, full)
        return False

    async def _replace(self, job: str, recipe: Recipe, full: _Held, present: _Held) -> None:
        if await self._serves(job, recipe, full):
            self._leave(job, present)

    def _leave(self, job: str, held: _Held) -> None:
        held.jobs.discard(job)
        if not held.jobs and held.farewell is None:
            loop = asyncio.get_running_loop()
            held.farewell = loop.call_later(self._linger_s, lambda: self._task(self._end(held)))
        self._changed()

    async def _end(self, held: _Held) -> None:
        self._held = {key: other for key, other in self._held.items() if other is not held}
        if held.farewell is not None:
            held.farewell.cancel()
        self._changed()
        await _stop(held.server)

    async def _learn(self, job: str, recipe: Recipe, directory: Path, *, load: bool) -> None:
        before = self._learnt.of(recipe.script)
        now = before.with_run(*await asyncio.to_thread(accounts, directory))
        if now == before:
            return
        await asyncio.to_thread(self._learnt.keep, recipe.script, now)
        if load and now.fit != before.fit and any(job in held.jobs for held in self._held.values()):
            await self.ready(job, self.informed(recipe))

    # ---------------------------------------------------------------- memory

    async def _make_room(self, held: _Held) -> None:
        """Before it is loaded: servers that nobody needs go first. Errors: Refused."""
        if held.state == "ready" or self._bytes_max is None:
            return
        expected = max(other.memory_bytes for other in self._held.values())  # its like, so far
        for idle in [other for other in self._held.values() if not other.jobs]:
            if self._bytes + expected > self._bytes_max:
                await self._end(idle)
        self._check_room(expected)

    def _check_room(self, more: int = 0) -> None:
        if self._bytes_max is not None and self._bytes + more > self._bytes_max:
            raise Refused(
                f"standby servers may hold {self._bytes_max >> 20} MiB of this node",
                why=f"they would hold {(self._bytes + more) >> 20} MiB",
                next="Start the agent with a larger --standby-memory.",
            )

    @property
    def _bytes(self) -> int:
        return sum(held.memory_bytes for held in self._held.values())

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _key(recipe: Recipe, wanted: Wanted, learnt: Iterable[str] = ()) -> str:
    modules = (*wanted.modules, *learnt, *(f"{name}={value}" for name, value in sorted(wanted.given.items())))
    kind = f"{wanted.ranks} {wanted.context}" if wanted.ranks else ""
    return key_of(recipe.interpreter, {**recipe.standby_env, "": recipe.standby_cwd + kind}, modules)


async def _stop(server: StandbyServer) -> None:
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await server.stop()
        await asyncio.to_thread(shutil.rmtree, server.directory, ignore_errors=True)
    except (KeepstepError, TimeoutError) as error:
        _log.warning("the standby server in %s does not stop: %s", server.directory.name, error)
