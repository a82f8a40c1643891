"""The agent: runs ranks on its node, tells how they are, and decides nothing but its own safety.

It may be killed or replaced at any time without costing a step: ranks belong to shims, what was ordered and
how it ended is on disk, and a new agent finds everything again. See `folder` for what lies where.

    launches -- attempt -- shimlink -- (the shim, its ranks)
       |           |-- preparation, rankenv, secrets, work, standbys, slots     before the start
       |           '-- progress, evidence, report                               what is told
    link ---- endpoint, spool                                                   to the controller and back
    watch --- alone                                                             beacons, and silence
    health - probes: gpu, xid, host, network, storage; exporter                 how the node does
    queries - logs, inquiry (kernel, controlserver, recorder, stacks, ras)      what is asked for
"""

import asyncio
import contextlib
import logging
import os
import platform
import signal
import socket
import sys
from collections.abc import Coroutine
from importlib import metadata
from typing import Any

from keepstep.agent import host, queries
from keepstep.agent.carriers import Carriers
from keepstep.agent.endpoint import Endpoint, endpoints, read_credential
from keepstep.agent.folder import Folder, Lock
from keepstep.agent.launches import Launches
from keepstep.agent.link import Link, Node
from keepstep.agent.probes.gpu import inventory
from keepstep.agent.probes.gpu.inventory import Inventory
from keepstep.agent.probes.health import Health
from keepstep.agent.settings import AgentSettings
from keepstep.agent.slots import Slots
from keepstep.agent.spool import Spool
from keepstep.agent.standbys import Ahead, Standbys
from keepstep.agent.surroundings import Surroundings
from keepstep.agent.watch import Watch
from keepstep.agent.work import Work
from keepstep.core import clock, ids
from keepstep.core.errors import KeepstepError, Unreachable
from keepstep.wire import messages as wire

_log = logging.getLogger("keepstep.agent")
_CAPABILITIES = ("logs", "inventory", "warm", "points", "evidence", "save")
_SETTLE_S = 10.0
_TICK_S = 0.5
_STORE_S = 1.0  # for the controller to ask that what is in memory be stored, before a drained node leaves
_TEXT_MAX = 2000
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_agent(settings: AgentSettings) -> int:
    """Until a signal, or until there is no use in going on; the exit code.

    Errors: Refused when another agent holds the folder, InputError for settings that cannot work.
    """
    folder = Folder(settings.dir.absolute())
    folder.make()
    lock = Lock(folder.path, settings.role)
    try:
        with contextlib.suppress(Unreachable):  # it may come up later
            endpoints(settings, read_credential(folder.credential))
        return asyncio.run(Agent(settings, folder).run())
    finally:
        lock.release()


class Agent:
    def __init__(self, settings: AgentSettings, folder: Folder) -> None:
        self._settings, self._folder = settings, folder
        self._clock, self._boot = clock.SystemClock(), clock.boot_id()
        chance = clock.system_random()
        self._instance = ids.short(chance, 12)
        self._inventory = Inventory(folder.probes(settings.role) / "gpus.json")
        self._gpus = settings.gpus if settings.gpus is not None else self._found_gpus()
        most = len(self._gpus) or settings.slots or host.cpu_count()
        count = most if settings.slots is None else min(most, settings.slots)
        self._slots = Slots(count if settings.runs_ranks else 0, self._gpus)
        self._spool = Spool(folder.events, clock=self._clock, boot=self._boot, bytes_max=settings.spool_bytes)
        node = Node(
            instance=self._instance, register=self._register, state=self._state, desired=self._desired,
            answer=self._answer,
        )  # fmt: skip
        self._link = Link(settings, folder, self._spool, node, clock=self._clock, chance=chance)
        self._launches = Launches(self._surroundings)
        self._interface = settings.interface or ""
        self._health = self._made_health() if settings.probes else None
        self._watch = Watch(self._launches, self._link.contact, self._clock)
        self._leaving, self._parent = False, os.getppid()
        self._leave = asyncio.Event()
        self._signals = 0
        self._drain = settings.attached or settings.drain
        self._hurry = asyncio.Event()  # a second signal: no more grace
        self._saves, self._saved_at = 0, 0.0  # under way; and when the last one was over
        self._exit_code = 0

    def _found_gpus(self) -> tuple[str, ...]:
        call_s = self._settings.driver_call_s
        return inventory.find(self._inventory, self._clock, os.environ, call_s=call_s)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signalled, number)
        _log.info("agent %s of node %s, process %d", self._instance, self._settings.node, os.getpid())
        if self._settings.leash:
            loop.add_reader(sys.stdin.fileno(), self._pulled)
        self._launches.adopt()
        await self._launches.settled(within_s=_SETTLE_S)
        works = [asyncio.create_task(work) for work in self._works()]
        leave = asyncio.create_task(self._leave.wait())
        try:
            done, _ = await asyncio.wait({*works, leave}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {leave}:
                task.result()  # a bug: loudly; whoever started us starts another, which adopts
            await self._say_goodbye()
            if self._drain:
                await self._launches.around.carriers.release(())
        finally:
            for task in (*works, leave):
                task.cancel()
            await asyncio.gather(*works, leave, return_exceptions=True)
            await self._launches.let_go()
            self._spool.close()
        return self._exit_code

    def _works(self) -> tuple[Coroutine[Any, Any, None], ...]:
        carriers = self._launches.around.carriers
        follow = carriers.follow(lambda: self._launches.carried)
        works = [self._link.run(), self._watch.run(), self._mind(), follow]
        if self._health is not None:
            works.append(self._health.run())
        if self._health is not None and self._settings.metrics is not None:
            works.append(self._exporting(*self._settings.metrics, self._health))
        return tuple(works)

    def _made_health(self) -> Health:
        return Health(
            self._settings, self._folder, self._inventory, clock=self._clock, boot=self._boot,
            launches=lambda: [attempt.launch for attempt in self._launches.living],
            interface=lambda: self._interface, changed=self._link.changed,
        )  # fmt: skip

    def _exporting(self, address: str, port: int, health: Health) -> Coroutine[Any, Any, None]:
        # They cost memory that most agents can keep.
        from keepstep.agent.probes.exporter import Exporter
        from keepstep.agent.probes.metrics import Metrics

        metrics = Metrics(health, platform.node(), self._launches.statuses)
        return Exporter(address, port, metrics).run()

    # ---------------------------------------------------------------- leaving

    def _signalled(self, number: int) -> None:
        _log.info("%s: leaving", signal.Signals(number).name)
        self._signals += 1
        self._drain = self._drain or number == signal.SIGINT  # TERM: for an upgrade, the ranks go on
        self._leave.set()
        if self._signals > 1:
            self._hurry.set()

    def _pulled(self) -> None:
        """What held the leash is gone, and this node's slots with it: there is no time for grace."""
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._drain = True
            self._go("what had started it is gone", 0)
            self._hurry.set()

    async def _say_goodbye(self) -> None:
        """Attached, draining or interrupted: end the ranks first. Then tell the controller, if it listens."""
        self._leaving = True
        self._link.changed()
        if self._drain:
            await self._end_ranks()
        contact = self._link.contact
        asked_at = self._clock.monotonic()
        self._link.changed()
        while contact.connected:
            heard = (contact.answered_at or 0.0) >= asked_at
            told = heard and self._spool.acknowledged >= self._spool.last
            late = self._clock.monotonic() >= asked_at + self._settings.leave_within_s
            if (told or late) and not self._keeps_what_is_wanted(asked_at):
                return
            await asyncio.sleep(0.02)

    def _keeps_what_is_wanted(self, asked_at: float) -> bool:
        """Whether what ranks have left in memory is being stored, or the controller may still ask for it."""
        carriers = self._launches.around.carriers
        if not self._drain or self._hurry.is_set() or not any(one.held for one in carriers.statuses()):
            return False
        since = max(asked_at, self._saved_at)
        return bool(self._saves) or self._clock.monotonic() < since + _STORE_S

    async def _end_ranks(self) -> None:
        ending = asyncio.create_task(self._launches.end_all("its agent was told to leave"))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({ending, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            await self._launches.end_all("its agent was told to leave at once", kill=True)
        hurry.cancel()
        await ending

    async def _mind(self) -> None:
        """Whether there is a reason to go on."""
        alone_s, last, told = 0.0, self._clock.monotonic(), False
        orphaned_s = self._settings.exit_when_orphaned_s
        while True:
            await asyncio.sleep(_TICK_S)
            now = self._clock.monotonic()
            contact = self._link.contact
            alone_s = 0.0 if contact.connected else alone_s + min(now - last, 2 * _TICK_S)
            last = now
            if contact.connected and not told:
                told = True
                _notify_systemd(f"READY=1\nSTATUS=connected, term {contact.term}")
            if self._settings.attached and os.getppid() != self._parent:
                self._go("its terminal is gone", 0)
            if self._launches.living:
                continue
            if contact.refused:
                self._go(f"nothing runs here, and {contact.refused}", KeepstepError.exit_code + 3)
            if orphaned_s is not None and alone_s >= orphaned_s:
                self._go(f"nothing runs here, and no controller for {alone_s:.0f} s", 0)

    def _go(self, why: str, exit_code: int) -> None:
        if not self._leave.is_set():
            _log.info("leaving: %s", why)
            self._exit_code = exit_code
            self._leave.set()

    # ---------------------------------------------------------------- the link's questions

    def _register(self, endpoint: Endpoint) -> wire.Register:
        address, interface = host.training_address(
            endpoint.url, self._settings.address, self._settings.interface
        )
        self._interface = interface
        return wire.Register(
            protocol=wire.PROTOCOL,
            version=_version(),
            node=self._settings.node,
            role=self._settings.role,
            pool=self._settings.pool,
            instance=self._instance,
            boot_id=self._boot,
            hostname=platform.node(),
            pid=os.getpid(),
            address=address,
            interface=interface,
            slots=self._slots.count,
            gpus=self._gpus,
            labels=self._settings.labels,
            capabilities=_CAPABILITIES,
        )

    def _state(self, sequence: int) -> wire.State:
        return wire.State(
            sequence=sequence,
            node=host.node_status(),
            attempts=self._launches.statuses(),
            standbys=self._launches.around.standbys.statuses(),
            snapshots=self._launches.around.carriers.statuses(),
            health=None if self._health is None else self._health.status(),
            leaving=self._leaving,
        )

    def _desired(self, desired: wire.Desired) -> None:
        if not self._settings.runs_ranks:
            return
        if self._leaving:
            self._launches.end(desired.stops)  # what else is ordered now is the next agent's
        else:
            self._launches.apply(desired)

    async def _answer(self, query: wire.Query) -> wire.Answer:
        saves = query.kind == "save"
        self._saves += saves
        try:
            return await queries.answer(query, self._launches, self._clock)
        finally:
            self._saves -= saves
            self._saved_at = self._clock.monotonic() if saves else self._saved_at

    # ---------------------------------------------------------------- what attempts need

    def _surroundings(self, launches: Launches) -> Surroundings:
        contact = self._link.contact
        return Surroundings(
            settings=self._settings,
            folder=self._folder,
            clock=self._clock,
            boot=self._boot,
            slots=self._slots,
            standbys=Standbys(
                self._folder,
                changed=self._link.changed,
                tell=lambda kind, job, text: self._tell(kind, job, 0, {"text": text}),
                ahead=self._ahead(),
                linger_s=self._settings.standby_linger_s,
                bytes_max=self._settings.standby_bytes_max,
            ),
            carriers=Carriers(
                self._folder,
                self._clock,
                bytes_max=self._settings.snapshot_bytes,
                changed=self._link.changed,
                tell=lambda kind, job, text: self._tell(kind, job, 0, {"text": text}),
            ),
            work=Work(self._folder, clock=self._clock, endpoint=lambda: contact.endpoint),
            controller=lambda: contact.endpoint.url if contact.endpoint else "",
            predecessors=launches.predecessors,
            changed=self._link.changed,
            device_uuid=self._device_uuid,
            tell=self._tell,
        )

    def _device_uuid(self, device: str) -> str:
        return "" if self._health is None else self._health.uuid_of(device)

    def _ahead(self) -> Ahead | None:
        wanted = self._settings.standby_processes
        if not (bool(self._gpus) if wanted is None else wanted):
            return None
        return Ahead(ranks=self._slots.count, context=self._settings.standby_context, gpus=self._gpus)

    def _tell(self, kind: str, job: str, attempt: int, data: dict[str, Any]) -> None:
        text = data.get("text")
        if isinstance(text, str) and len(text) > _TEXT_MAX:
            data = {**data, "text": text[:_TEXT_MAX]}
        self._spool.append(kind, job=job, attempt=attempt, data=data)
        self._link.news()


def _version() -> str:
    try:
        return metadata.version("keepstep")
    except metadata.PackageNotFoundError:
        return "0"


def _notify_systemd(text: str) -> None:
    """Type=notify units; silent everywhere else."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
