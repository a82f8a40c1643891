"""What the node runs against what it should run, looked at as levels.

A launch that is not on disk is begun; one that is goes on; a stop ends, and confirms also what never was.
After a restart every folder is found again. Nothing here waits: each attempt lives in a task of its own.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from keepstep.agent import history, preparation, report, shimlink
from keepstep.agent.attempt import Attempt, Order
from keepstep.agent.surroundings import Surroundings
from keepstep.core import durable
from keepstep.core.errors import KeepstepError
from keepstep.wire.messages import AttemptStatus, Desired, Keep, Launch, Stop, Warm

_log = logging.getLogger("keepstep.agent")
_REPORTED_DEAD_MAX = 64
_SWEEP_TIMEOUT_S = 60.0

Key = tuple[str, int]


class Launches:
    def __init__(self, around: Callable[["Launches"], Surroundings]) -> None:
        self.around = around(self)
        self.attempts: dict[Key, Attempt] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._others: set[asyncio.Task[None]] = set()
        self._warm: dict[str, Warm] = {}
        self._kept: dict[str, Keep] = {}
        self._keeping = asyncio.Lock()

    # ---------------------------------------------------------------- after a start

    def adopt(self) -> None:
        """Every attempt that an earlier agent began and that is not over and recorded."""
        for job, number, directory in self.around.folder.attempts():
            if (directory / "forgotten").exists():
                continue
            order = _read_order(directory)
            if order is None:
                # Killed between the folder and its order: nothing was started, and nothing may be now.
                self._bury(
                    _unknown(job, number), directory, "the agent was ended before this attempt was begun"
                )
                continue
            attempt = Attempt(order, directory, self.around)
            attempt.outcome = _read_outcome(directory)
            self.attempts[job, number] = attempt
            if attempt.outcome is None:
                self.around.slots.keep((job, number), order.slots)
                self._live(attempt, found=True)

    async def settled(self, *, within_s: float) -> None:
        """Adopted attempts are known again (or are slow): what is reported first should be true."""
        waits = [asyncio.create_task(attempt.found.wait()) for attempt in self.living]
        if waits:
            _, slow = await asyncio.wait(waits, timeout=within_s)
            for task in slow:
                task.cancel()

    # ---------------------------------------------------------------- orders

    def apply(self, desired: Desired) -> None:
        self.end(desired.stops)
        for launch in desired.launches:
            self._launch(launch)
        for job, number in desired.forget:
            self._forget((job, number))
        self._keep_carriers(desired.keep)
        self._keep_warm(desired.warm)

    def end(self, stops: Iterable[Stop]) -> None:
        for stop in stops:
            self._stop(stop)

    def _launch(self, launch: Launch) -> None:
        key = launch.job, launch.attempt
        known = self.attempts.get(key)
        if known is not None:
            known.update(launch)
            return
        try:
            directory = self.around.folder.attempt(*key)
        except KeepstepError as error:
            _log.warning("a launch is not taken: %s", error)
            return
        if launch.attempt <= self.around.folder.removed(launch.job):
            self._bury(launch, directory, "this attempt was here before, and its folder was cleaned away")
            return
        directory.parent.mkdir(mode=0o700, exist_ok=True)
        if not shimlink.claim(directory):
            # Forgotten ones are not in memory; whatever it was, it was started once.
            self._bury(launch, directory, "this attempt was here before")
            return
        try:
            slots = self.around.slots.take(key, len(launch.ranks))
        except KeepstepError as error:
            self._bury(launch, directory, str(error), phase="refused")
            return
        order = Order(launch=launch, slots=slots)
        durable.write(directory / "order.msgpack", msgspec.msgpack.encode(order))
        attempt = self.attempts[key] = Attempt(order, directory, self.around)
        self._live(attempt, found=False)
        self.around.changed()

    def _stop(self, stop: Stop) -> None:
        key = stop.job, stop.attempt
        known = self.attempts.get(key)
        if known is not None:
            known.stop(stop.reason, stop.grace_s, stop.finish_s)
            return
        try:
            directory = self.around.folder.attempt(*key)
        except KeepstepError as error:
            _log.warning("a stop is not taken: %s", error)
            return
        directory.parent.mkdir(mode=0o700, exist_ok=True)
        shimlink.claim(directory)  # a late launch finds it taken
        attempt = Attempt(Order(launch=_unknown(*key)), directory, self.around)
        self.attempts[key] = attempt
        self._tasks[key] = asyncio.create_task(self._confirm(attempt))

    async def _confirm(self, attempt: Attempt) -> None:
        """That nothing is left of what this agent does not know."""
        swept = await shimlink.sweep(attempt.marker, timeout_s=_SWEEP_TIMEOUT_S)
        if swept.left:
            _log.warning("attempt %s/%d: %d processes cannot be killed", *attempt.key, swept.left)
            self.attempts.pop(attempt.key, None)  # the stop will be repeated
            return
        found = f"; {swept.killed} processes of it were ended" if swept.killed else ""
        self._bury(attempt.launch, attempt.directory, f"nothing of it runs here{found}")

    def _forget(self, key: Key) -> None:
        attempt = self.attempts.get(key)
        if attempt is None or attempt.living:
            return
        del self.attempts[key]
        self._tasks.pop(key, None)
        if attempt.directory.is_dir():
            (attempt.directory / "forgotten").touch()
        self._task(self._clean(key[0]))
        self.around.changed()

    async def _clean(self, job: str) -> None:
        living = frozenset(self.attempts)
        await asyncio.to_thread(history.clean, self.around.folder, self.around.settings.history, living)
        await self._release()

    # ---------------------------------------------------------------- standby servers

    def _keep_warm(self, wanted: Iterable[Warm]) -> None:
        now = {warm.job: warm for warm in wanted}
        for job, warm in now.items():
            if self._warm.get(job) != warm:
                self._task(self._load(warm))
        dropped = self._warm.keys() - now.keys()
        self._warm = now
        if dropped:
            self._task(self._release())

    async def _release(self) -> None:
        """What is kept for jobs that have, and will have, nothing here."""
        wanted = {key[0] for key in self.attempts} | set(self._warm)
        await self.around.standbys.release(wanted)
        await self.around.carriers.release(wanted | set(self._kept))

    # ---------------------------------------------------------------- carriers without ranks

    def _keep_carriers(self, wanted: Iterable[Keep]) -> None:
        now = {keep.job: keep for keep in wanted}
        for job, keep in now.items():
            if self._kept.get(job) != keep:
                self._task(self._keep(keep))
        dropped = self._kept.keys() - now.keys()
        self._kept = now
        if dropped:
            self._task(self._release())

    async def _keep(self, wanted: Keep) -> None:
        """One after the other: a newer order is carried out last."""
        async with self._keeping:
            if self._kept.get(wanted.job) != wanted:
                return
            if wanted.over:
                await self.around.carriers.look(wanted.job, after=wanted.attempt)
            else:
                await self.around.carriers.keep(wanted, self.around.address(2)[0])

    async def _load(self, warm: Warm) -> None:
        try:
            made = await self.around.recipe_for(warm.job, warm.run, self.around.folder.path)
            await self.around.standbys.ready(warm.job, made)
        except KeepstepError as error:
            self.around.tell("standby_broken", warm.job, 0, {"text": f"no standby server: {error}"})

    # ---------------------------------------------------------------- reports, and the end

    def statuses(self) -> tuple[AttemptStatus, ...]:
        """All that live, and the newest of the dead whose end is not recorded yet."""
        living = [attempt for attempt in self.attempts.values() if attempt.living]
        dead = [attempt for attempt in self.attempts.values() if not attempt.living]
        return tuple(attempt.status() for attempt in living + dead[-_REPORTED_DEAD_MAX:])

    @property
    def living(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts.values() if attempt.living]

    @property
    def carried(self) -> list[Launch | Keep]:
        """Who needs a carrier on this node."""
        return [*(attempt.launch for attempt in self.living), *self._kept.values()]

    def latest(self, job: str) -> int | None:
        """The newest attempt of a job of which there is a folder here, also a forgotten one."""
        numbers = [number for name, number, _ in self.around.folder.attempts() if name == job]
        return max(numbers, default=None)

    async def end_all(self, reason: str, *, kill: bool = False) -> None:
        """End every rank with the job's own grace, and wait until nothing is left but what is in memory."""
        for attempt in self.living:
            grace = 0.0 if kill else preparation.read_run(attempt.launch.run).stop.grace_s
            attempt.stop(reason, grace)
        if tasks := [self._tasks[attempt.key] for attempt in self.living if attempt.key in self._tasks]:
            await asyncio.wait(tasks)
        await self.around.standbys.end_all()

    def predecessors(self, job: str, number: int) -> list[Awaitable[Any]]:
        return [
            self._tasks[attempt.key]
            for attempt in self.living
            if attempt.key[0] == job and attempt.key[1] < number and attempt.key in self._tasks
        ]

    async def let_go(self) -> None:
        """The agent leaves: shims and ranks go on."""
        tasks = [*self._tasks.values(), *self._others]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _live(self, attempt: Attempt, *, found: bool) -> None:
        self._tasks[attempt.key] = asyncio.create_task(attempt.live(found=found))

    def _task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    def _bury(self, launch: Launch, directory: Path, reason: str, phase: str = "dead") -> None:
        """An attempt that does not run and never will: reported until it is forgotten."""
        attempt = Attempt(Order(launch=launch), directory, self.around)
        attempt.outcome = _read_outcome(directory)
        if attempt.outcome is None:
            attempt.bury(phase, reason)
        self.attempts[attempt.key] = attempt


def _unknown(job: str, attempt: int) -> Launch:
    return Launch(
        job=job,
        attempt=attempt,
        world_size=0,
        nodes=("?",),
        node_rank=0,
        ranks=(),
        run={},
        layout={},
        replicas=0,
    )


def _read_order(directory: Path) -> Order | None:
    try:
        return msgspec.msgpack.decode((directory / "order.msgpack").read_bytes(), type=Order)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _read_outcome(directory: Path) -> report.Outcome | None:
    try:
        return msgspec.json.decode((directory / "outcome.json").read_bytes(), type=report.Outcome)
    except (FileNotFoundError, msgspec.MsgspecError, json.JSONDecodeError):
        return None
