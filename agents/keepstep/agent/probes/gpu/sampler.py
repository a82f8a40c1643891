"""Keeps a sampling process going, and takes over what it says.

    hangs about one GPU    -> replaced by one that leaves this GPU out; the others lose a few seconds
    hangs in NVML itself   -> replaced after a pause, longer each time
    dies                   -> the same; a driver may end a process by a signal

A GPU that hangs or is lost is tried now and then, in a process of its own; when it answers, it is taken back.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from keepstep.agent.probes.gpu import catalogue, inventory
from keepstep.agent.probes.gpu.evolution import Evolution, Hung
from keepstep.agent.probes.gpu.inventory import Inventory
from keepstep.agent.probes.gpu.page import EVENTS, NO_GPU, PASS
from keepstep.agent.probes.gpu.process import SamplingProcess
from keepstep.agent.probes.gpu.reading import Blind, Events, Frame, Identity, Opened, Order, Pass, Refused
from keepstep.core.clock import Clock
from keepstep.core.health import ProbeState
from keepstep.wire.health import ProbeStatus

_log = logging.getLogger("keepstep.agent")
_TICK_S = 0.5
_SILENT_S = 30.0  # between calls, without a frame: starved, stopped, or broken
_PAUSE_FIRST_S, _PAUSE_MAX_S = 1.0, 600.0
_TRIAL_FIRST_S, _TRIAL_MAX_S = 60.0, 600.0
_UNDEAD_MAX = 4  # processes that the driver does not let go: more would hang there as well


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How patient the supervision is. Seconds."""

    call_s: float = 3.0  # a driver call that takes longer hangs
    trial_s: float = _TRIAL_FIRST_S  # until a hung GPU is tried again; doubled each time


@dataclass(slots=True)
class _Trial:
    """Of one GPU that hangs or is lost."""

    due: float
    pause_s: float
    process: SamplingProcess | None = None
    well: bool = False
    found: tuple[Identity, ...] = ()  # what it is, where that was never told before


class Sampler:
    def __init__(
        self, store: Inventory, only: tuple[str, ...], clock: Clock, pace: Pace, *,
        events: Callable[[Events], None], changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.evolution = Evolution()
        self.hung: dict[str, Hung] = {}  # by UUID; by index where it was never told
        self.status = ProbeStatus(name="gpu", state=ProbeState.ABSENT, reason="not looked for yet")
        self._blind, self._deaf = "no driver", ""
        self.opened: Opened | None = None
        self.pass_cpu_ms = 0.0
        self.pid = 0
        self._store, self._only, self._clock, self._pace = store, only, clock, pace
        self._events, self._changed = events, changed
        self._trials: dict[str, _Trial] = {}
        self._undead: list[SamplingProcess] = []  # killed, and not gone yet
        self._process: SamplingProcess | None = None
        self._refused = False
        self.unusable = False  # NVML as a whole, on a node that has a driver

    @property
    def blind(self) -> str:
        """Why NVML's events are not heard; "": they are."""
        return self._blind or self._deaf

    @property
    def known(self) -> tuple[Identity, ...]:
        """The GPUs that this node has or had, as far as they concern this agent."""
        return tuple(
            gpu for gpu in self._store.gpus
            if not self._only or gpu.uuid in self._only or str(gpu.index) in self._only
        )  # fmt: skip

    @property
    def present(self) -> tuple[Identity, ...]:
        """Those that NVML told when it was first asked, reachable or not."""
        if self.opened is None:
            return self._store.gpus
        told = {gpu.uuid for gpu in self.opened.gpus}
        silent = {*self.opened.errors, *(int(name) for name in self.hung if name.isdecimal())}
        lost = [gpu for gpu in self._store.gpus if gpu.index in silent and gpu.uuid not in told]
        return (*self.opened.gpus, *lost)

    async def run(self) -> None:
        """Until cancelled, or until it is clear that there is nothing to sample."""
        if not inventory.may_be_here(os.environ):
            self._say(ProbeState.ABSENT, "no NVIDIA driver here")
            return
        pause_s = _PAUSE_FIRST_S
        try:
            while True:
                while len(self._undead) >= _UNDEAD_MAX:
                    await self._wait(_TICK_S)
                began = self._clock.monotonic()
                if not await self._one_process():
                    if self._clock.monotonic() - began > _PAUSE_MAX_S:
                        pause_s = _PAUSE_FIRST_S
                    await self._wait(pause_s)
                    pause_s = min(2 * pause_s, _PAUSE_MAX_S)
        finally:
            for process in (self._process, *(trial.process for trial in self._trials.values())):
                if process is not None:
                    process.end()
            for process in self._undead:
                process.end()

    async def _wait(self, seconds: float) -> None:
        end = self._clock.monotonic() + seconds
        while (left := end - self._clock.monotonic()) > 0:
            await asyncio.sleep(min(_TICK_S, left))
            self._bury()

    async def _one_process(self) -> bool:
        """One process from its start to its end. True: the next one may be started at once."""
        known = self.present if self.opened is not None else ()
        order = Order(parent=0, page=0, known=known, left_out=tuple(self.hung), only=self._only)
        try:
            process = self._process = SamplingProcess(order, self._take)
        except OSError as error:
            self._say(ProbeState.DEGRADED, f"the sampling process cannot be started: {error}")
            return False
        self.pid, self._refused = process.pid, False
        try:
            return await self._attend(process)
        finally:
            process.end()
            self._undead.append(process)
            self._process, self.pid = None, 0

    async def _attend(self, process: SamplingProcess) -> bool:
        last, frames, silent_s = self._clock.monotonic(), 0, 0.0
        while True:
            self._watch_lost()
            try:
                async with asyncio.timeout(_TICK_S):
                    await process.ended.wait()
            except TimeoutError:
                pass
            else:
                return self._ended(process)
            now = self._clock.monotonic()
            elapsed_s, last = min(now - last, 2 * _TICK_S), now
            silent_s = silent_s + elapsed_s if process.frames == frames else 0.0
            frames = process.frames
            stuck_s, gpu, call = process.stuck_s(PASS, elapsed_s)
            if stuck_s > (self._pace.call_s if gpu != NO_GPU else inventory.OPEN_S):
                return self._hangs(gpu, call, now - stuck_s)
            if gpu == NO_GPU and stuck_s > inventory.OPEN_S / 2:
                self._fails(ProbeState.HUNG, f"{call} has not come back yet")
            if silent_s > (_SILENT_S if not call or gpu != NO_GPU else 2 * inventory.OPEN_S):
                self._say(ProbeState.HUNG, f"the sampling process says nothing for {silent_s:.0f} s")
                return False
            deaf_s, _, waits = process.stuck_s(EVENTS, elapsed_s)
            self._deaf = f"{waits} does not come back" if deaf_s > 1.0 + self._pace.call_s else ""
            self._bury()
            if self._try_again(now):
                return True

    def _ended(self, process: SamplingProcess) -> bool:
        if not self._refused:  # else it has said why
            say = self._say if process.frames else self._fails
            say(ProbeState.DEGRADED, f"the sampling process has ended: {process.how}")
        return False

    def _hangs(self, gpu: int, call: str, since: float) -> bool:
        if gpu == NO_GPU:
            self._fails(ProbeState.HUNG, f"{call} does not come back")
            return False
        identity = next((each for each in self.present if each.index == gpu), Identity(gpu))
        name = identity.uuid or str(gpu)
        _log.warning("GPU %d (%s): %s does not come back; it is left out", gpu, identity.uuid, call)
        self.hung[name] = Hung(call=call, since=since)
        self._trials[name] = _Trial(self._clock.monotonic() + self._pace.trial_s, self._pace.trial_s)
        self._well()
        self._changed()
        return True

    # ---------------------------------------------------------------- GPUs that do not answer

    def _watch_lost(self) -> None:
        """A lost GPU may be there again, after a reset; this process's handle of it may not tell."""
        now = self._clock.monotonic()
        lost = {uuid for uuid, reading in self.evolution.readings.items() if reading.error}
        if self.opened is not None:
            lost |= {gpu.uuid for gpu in self.present if gpu.index in self.opened.errors}
        for name in lost - self._trials.keys():
            self._trials[name] = _Trial(now + self._pace.trial_s, self._pace.trial_s)
        for name in self._trials.keys() - lost - self.hung.keys():
            if self._trials[name].process is None:  # it is back
                del self._trials[name]

    def _try_again(self, now: float) -> bool:
        """Trials that are due, and how they go. True: a GPU is back."""
        for name, trial in list(self._trials.items()):
            process = trial.process
            if process is None:
                if now >= trial.due:
                    trial.process = self._begin_trial(name, trial)
                continue
            if not trial.well and not process.ended.is_set():
                stuck_s, gpu, _ = process.stuck_s(PASS, _TICK_S)
                if stuck_s <= (self._pace.call_s if gpu != NO_GPU else inventory.OPEN_S):
                    continue
            process.end()
            if trial.well:
                self._undead.append(process)
                del self._trials[name]
                self.hung.pop(name, None)
                if self.opened is not None:
                    self.opened.gpus += [gpu for gpu in trial.found if gpu not in self.opened.gpus]
                    for found in trial.found:
                        self.opened.errors.pop(found.index, None)
                _log.info("GPU %s answers again", name)
                self._well()
                self._changed()
                return True
            if process.gone:  # else it hangs in the kernel, and another one would as well
                trial.process = None
                trial.pause_s = min(2 * trial.pause_s, _TRIAL_MAX_S)
                trial.due = now + trial.pause_s
        return False

    def _begin_trial(self, name: str, trial: _Trial) -> SamplingProcess | None:
        def take(frame: Frame) -> None:
            if isinstance(frame, Opened):
                trial.found = tuple(frame.gpus)
            well = isinstance(frame, Pass) and any(not reading.error for reading in frame.readings)
            trial.well = trial.well or well

        known = tuple(gpu for gpu in self.present if gpu.uuid == name)
        order = Order(parent=0, page=0, known=known, only=(name,), passes=1, events=False)
        try:
            return SamplingProcess(order, take)
        except OSError:
            trial.due = self._clock.monotonic() + trial.pause_s
            return None

    def _bury(self) -> None:
        if self._undead:
            self._undead = [process for process in self._undead if not process.gone]

    # ---------------------------------------------------------------- what it says

    def _take(self, frame: Frame) -> None:
        match frame:
            case Pass():
                self.evolution.take(frame.readings)
                self.pass_cpu_ms = frame.cpu_ms
                self._well()
                self._changed()
            case Events():
                now = self._clock.monotonic()
                for uuid, action in frame.actions.items():
                    self.evolution.asked(uuid, action, now)
                self._events(frame)
                self._changed()
            case Opened():
                self._blind = ""
                if self.opened is None:  # later ones are told which GPUs there are
                    self.opened = frame
                    self._store.see(frame.gpus)
                self._cannot_open(frame)
                self._well()
            case Blind():
                self._blind = frame.why
            case Refused():
                self._refused = True
                absent = frame.error in catalogue.NO_DRIVER and not self._store.gpus
                state = ProbeState.ABSENT if absent else ProbeState.DEGRADED
                self._fails(state, f"NVML cannot be used: {frame.text}")

    def _cannot_open(self, frame: Opened) -> None:
        """GPUs that were there for an earlier process and are not for this one."""
        for gpu in self.present:
            if gpu.index in frame.errors and gpu.uuid in self.evolution.readings:
                self.evolution.readings[gpu.uuid].error = frame.errors[gpu.index]

    def _fails(self, state: ProbeState, reason: str) -> None:
        self.unusable = state != ProbeState.ABSENT
        self._say(state, reason)

    def _well(self) -> None:
        self.unusable = False
        if self.hung:
            names = ", ".join(f"{name} in {stuck.call}" for name, stuck in self.hung.items())
            self._say(ProbeState.HUNG, f"left out: {names}")
        elif why := self.evolution.failing():
            self._say(ProbeState.DEGRADED, why)
        elif self.opened is not None and not self.opened.gpus and not self._store.gpus:
            self._say(ProbeState.ABSENT, "the driver has no GPUs")
        else:
            self._say(ProbeState.OK, "")

    def _say(self, state: ProbeState, reason: str) -> None:
        status = ProbeStatus(name="gpu", state=state, reason=reason)
        if status != self.status:
            if state not in {ProbeState.OK, ProbeState.ABSENT}:
                _log.warning("the GPUs' probe: %s", reason)
            self.status = status
            self._changed()
