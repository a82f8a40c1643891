"""All probes of a node, and what they say now.

    gpu      sampler - (a process that asks NVML) - evolution
    xid      watcher - ledger          the kernel's log, and NVML's events
    host     source - evolution        /proc
    network  source - evolution        /sys, and the buddy's carrier
    storage  source - (a process for each trial) - evolution

Sources touch the world, evolutions are pure, thresholds and catalogues are data. What may hang, does so in a
process of its own. Where there is no NVIDIA driver nothing is started for it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from keepstep.agent import preparation
from keepstep.agent.folder import Folder
from keepstep.agent.probes.gpu import evolution as gpus
from keepstep.agent.probes.gpu.inventory import Inventory
from keepstep.agent.probes.gpu.sampler import Pace, Sampler
from keepstep.agent.probes.host import source as host
from keepstep.agent.probes.host.evolution import Evolution as Host
from keepstep.agent.probes.network import source as network
from keepstep.agent.probes.network.evolution import Evolution as Network
from keepstep.agent.probes.standing import Standing
from keepstep.agent.probes.storage.source import Trials
from keepstep.agent.probes.xid.watcher import Watcher
from keepstep.agent.settings import AgentSettings
from keepstep.core.clock import Clock
from keepstep.core.health import ProbeState
from keepstep.wire.health import Check, HealthStatus, ProbeStatus
from keepstep.wire.messages import Launch

_log = logging.getLogger("keepstep.agent")
_TURN_S = 1.0
_HOST_S, _NETWORK_S = 10.0, 10.0


class Health:
    def __init__(
        self, settings: AgentSettings, folder: Folder, inventory: Inventory, *, clock: Clock, boot: str,
        launches: Callable[[], Iterable[Launch]], interface: Callable[[], str], changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self._folder, self._clock, self._boot = folder, clock, boot
        self._launches, self._interface, self._changed = launches, interface, changed
        self._store = inventory
        kept = folder.probes(settings.role)
        kept.mkdir(exist_ok=True)
        self.watcher = Watcher(settings.kernel_log, kept / "faults.msgpack", boot, clock, self._counted)
        only = settings.gpus or ()
        self._none = settings.gpus == ()  # by its settings this node has none
        self.sampler = Sampler(
            inventory, only, clock, Pace(call_s=settings.driver_call_s, trial_s=settings.driver_trial_s),
            events=self.watcher.take, changed=self._look,
        )  # fmt: skip
        self._host, self._network, self._trials = Host(), Network(), Trials(clock)
        self._checks: dict[str, tuple[Check, ...]] = {}
        self._statuses: dict[str, ProbeStatus] = {}
        self._standing = Standing()
        self._due = {"host": 0.0, "network": 0.0, "buddy": 0.0}
        self._buddies: asyncio.Task[dict[str, str]] | None = None

    async def run(self) -> None:
        """Until cancelled. Whatever a probe cannot do, it says, and the others go on."""
        works = [self._guarded("xid", self.watcher.run()), self._guarded("host", self._turns())]
        if self._none:
            self.sampler.status = ProbeStatus(
                name="gpu", state=ProbeState.ABSENT, reason="none by its settings"
            )
        else:
            works.append(self._guarded("gpu", self.sampler.run()))
        tasks = [asyncio.create_task(work) for work in works]
        try:
            await asyncio.gather(*tasks)
            await asyncio.Event().wait()
        finally:
            self._trials.end()
            if self._buddies is not None:
                self._buddies.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _guarded(self, probe: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - outermost of one probe: the agent and the others go on
            _log.exception("the probe %s has ended: a bug", probe)
            self._say(f"{probe} (ended)", ProbeState.DEGRADED, f"a bug: {error!r}")

    # ---------------------------------------------------------------- what is told

    def status(self) -> HealthStatus:
        now = self._clock.monotonic()
        sampler = self.sampler
        mine = sampler.known
        others = {gpu.pci for gpu in self._store.gpus} - {gpu.pci for gpu in mine}
        return HealthStatus(
            epoch=self._boot,
            gpus=sampler.evolution.samples(now),
            checks=self._standing.now,
            faults=self.watcher.faults({gpu.pci: gpu.uuid for gpu in mine}, without=others),
            probes=(sampler.status, self._xid(), *self._statuses.values()),
            fabric=sampler.evolution.fabric(),
        )

    def uuid_of(self, device: str) -> str:
        """Of a device as CUDA_VISIBLE_DEVICES names it: by UUID, its beginning, or index; "": not known."""
        for gpu in self.sampler.present:
            if device in {gpu.uuid, str(gpu.index)} or (len(device) > 4 and gpu.uuid.startswith(device)):
                return gpu.uuid
        return device if device.startswith(("GPU-", "MIG-")) else ""

    def _xid(self) -> ProbeStatus:
        gpus = self.sampler.status.state != ProbeState.ABSENT
        return self.watcher.status(self.sampler.blind, gpus=gpus)

    # ---------------------------------------------------------------- looking

    def _look(self) -> None:
        """What is not well now; told at once when that is something else than before."""
        now = self._clock.monotonic()
        sampler = self.sampler
        for pci, (action, at) in self.watcher.actions.items():
            for gpu in sampler.present:
                if gpu.pci == pci:
                    sampler.evolution.asked(gpu.uuid, action, at)
        errors = sampler.opened.errors if sampler.opened is not None else {}
        self._checks["gpu"] = (
            *sampler.evolution.checks(now, sampler.present, errors),
            *gpus.hung_checks(sampler.hung, now),
            *self._missing(),
        )
        self._update(now)

    def _counted(self, fresh: bool) -> None:
        """Something was counted: told at once unless it happens all the time."""
        self._look()
        if fresh:
            self._changed()

    def _update(self, now: float) -> None:
        found = [check for checks in self._checks.values() for check in checks]
        if self._standing.update(found, now):
            self._changed()

    def _missing(self) -> Iterable[Check]:
        sampler = self.sampler
        if not sampler.known or not (sampler.unusable or sampler.opened is not None):
            return ()
        told = () if sampler.unusable else sampler.present
        here = {gpu.uuid for gpu in told} | sampler.hung.keys()
        absent = [gpu for gpu in sampler.known if gpu.uuid not in here]
        return gpus.missing_check(len(sampler.known), len(sampler.known) - len(absent), absent)

    async def _turns(self) -> None:
        while True:
            now = self._clock.monotonic()
            if now >= self._due["host"]:
                self._due["host"] = now + _HOST_S
                self._look_at_host(now)
            if now >= self._due["network"]:
                self._due["network"] = now + _NETWORK_S
                self._look_at_network(now)
            self._look_at_storage()
            self._look_at_buddies(now)
            self._update(self._clock.monotonic())
            await asyncio.sleep(_TURN_S)

    def _look_at_host(self, now: float) -> None:
        folders = (Path("/"), self._folder.path, Path("/tmp"))  # noqa: S108 - full ones end jobs
        try:
            self._checks["host"] = self._host.take(host.observe(folders, now))
        except (OSError, ValueError, IndexError) as error:
            self._say("host", ProbeState.DEGRADED, f"/proc cannot be read: {error}")
        else:
            self._say("host", ProbeState.OK, "")

    def _look_at_network(self, now: float) -> None:
        try:
            links, ports = network.interfaces(), network.ports()
        except OSError as error:
            self._say("network", ProbeState.DEGRADED, f"/sys cannot be read: {error}")
            return
        self._checks["network"] = self._network.take(links, ports, self._interface(), now)
        self._say("network", ProbeState.OK, "")

    def _look_at_buddies(self, now: float) -> None:
        if self._buddies is not None and self._buddies.done():
            self._checks["buddy"] = self._network.reached(self._buddies.result())
            self._buddies = None
        if now < self._due["buddy"] or self._buddies is not None:
            return
        self._due["buddy"] = now + _NETWORK_S
        addresses = {
            launch.buddy: launch.carriers[launch.buddy]
            for launch in self._launches()
            if launch.secret and launch.buddy in launch.carriers
        }
        self._buddies = asyncio.create_task(_reach(addresses))

    def _look_at_storage(self) -> None:
        folders = {str(f) for launch in self._launches() if (f := preparation.checkpoint_folder(launch))}
        if not folders and not self._trials.folders:
            self._say("storage", ProbeState.ABSENT, "no checkpoint folders are in use")
            return
        self._trials.turn(folders)
        self._checks["storage"] = self._trials.checks()
        hanging = self._trials.hanging()
        if hanging:
            self._say("storage", ProbeState.HUNG, f"does not come back: {', '.join(hanging)}")
        else:
            self._say("storage", ProbeState.OK, "")

    def _say(self, probe: str, state: ProbeState, reason: str) -> None:
        self._statuses[probe] = ProbeStatus(name=probe, state=state, reason=reason)


async def _reach(addresses: dict[str, tuple[str, int]]) -> dict[str, str]:
    answers = await asyncio.gather(*(network.reaches(*address) for address in addresses.values()))
    return dict(zip(addresses, answers, strict=True))
