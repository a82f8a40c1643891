"""One attempt on this node, from its Launch to the certainty that nothing of it is left.

    preparing --shim's store listens--> prepared --go--> running --> ending --> dead
        \\--> refused (nothing was started)

Orders are levels: the newest Launch and the sharpest Stop are kept, and whatever is not yet so is made so.
"""

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from keepstep.agent import preparation, report, shimlink
from keepstep.agent.alone import Solitude
from keepstep.agent.evaluations import Evaluations
from keepstep.agent.evidence import Evidence, collect
from keepstep.agent.progress import Progress
from keepstep.agent.pulse import Pulses, bubble_s, phases
from keepstep.agent.rank.protocol import IDENTITY, LAUNCH, RankState, ShimStatus
from keepstep.agent.standbys import Place
from keepstep.agent.surroundings import Surroundings
from keepstep.agent.unfinished import let_finish
from keepstep.core import durable
from keepstep.core.errors import KeepstepError, TimedOut
from keepstep.wire.messages import AttemptStatus, Launch

_log = logging.getLogger("keepstep.agent")
_CONFIRM_TIMEOUT_S = 120.0
_ADOPT_TIMEOUT_S = 10.0
_FAREWELL_S = 10.0  # of a shim whose connection has ended
_AGAIN_S = 5.0  # a shim that did not answer is told again
_RETRY_S = 5.0  # of what could not be killed


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What order.msgpack holds."""

    launch: Launch
    slots: tuple[int, ...] = ()


class Attempt:
    def __init__(self, order: Order, directory: Path, around: Surroundings) -> None:
        self.launch, self.directory = order.launch, directory
        self.key = order.launch.job, order.launch.attempt
        self.progress, self.pulses, self.solitude = Progress(), Pulses(), Solitude()
        self._evaluations = Evaluations(directory)
        self.outcome: report.Outcome | None = None
        self.shim: shimlink.Shim | None = None
        self.found = asyncio.Event()  # an adopted one is known again: may be reported
        self._around, self._slots = around, order.slots
        self._phase, self._reason = "preparing", ""
        self._warm, self._cold_reason = False, ""
        self._alive = 0
        self._address = ""
        self._master: tuple[str, int] | None = None
        self._states = report.waiting(order.launch.ranks)
        self._evidence: dict[int, Evidence] = {}
        self._stop: tuple[str, float] | None = None  # reason, grace
        self._told_grace_s: float | None = None
        self._finish_s = 0.0  # for files that are just being written
        self._went = False
        self._made: preparation.Recipe | None = None
        self._learnt = False
        self._stop_wanted, self._poke = asyncio.Event(), asyncio.Event()

    @property
    def marker(self) -> str:
        return f"{self.launch.job}/{self.launch.attempt}/{self._around.settings.node}"

    @property
    def living(self) -> bool:
        return self.outcome is None

    @property
    def ending(self) -> bool:
        """Was told to end."""
        return self._stop is not None

    # ---------------------------------------------------------------- orders

    def update(self, launch: Launch) -> None:
        """A newer form of the same launch: it may go now."""
        if launch != self.launch:
            self.launch = launch
            self._poke.set()

    def stop(self, reason: str, grace_s: float, finish_s: float = 0.0) -> None:
        """End it. A later, sharper order replaces an earlier one; a milder one changes nothing."""
        self._finish_s = finish_s if self._stop is None else min(finish_s, self._finish_s)
        if self.outcome is None and (self._stop is None or grace_s < self._stop[1]):
            self._stop = reason, grace_s
            self._stop_wanted.set()
            self._poke.set()

    # ---------------------------------------------------------------- life

    async def live(self, *, found: bool) -> None:
        """To the end. `found`: an earlier agent began it. Never raises for the world's reasons."""
        try:
            shim = await (self._adopt() if found else self._begin())
            while shim is not None:
                shim = await self._serve(shim)
        except KeepstepError as error:
            await self._give_up(str(error))
        except Exception as error:  # noqa: BLE001 - outermost of one attempt: the others must go on
            _log.exception("attempt %s/%d: a bug", *self.key)
            await self._give_up(f"a bug in the agent: {error!r}")
        finally:
            self.found.set()
            if self.outcome is not None:
                self._around.slots.release(self.key)

    async def _begin(self) -> shimlink.Shim | None:
        making = asyncio.create_task(self._make())
        stopping = asyncio.create_task(self._stop_wanted.wait())
        try:
            await asyncio.wait({making, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not making.done():
                making.cancel()
                await asyncio.wait({making})
            if making.cancelled():  # it may have started a shim all the same
                return await self._adopt()
            return making.result()
        finally:
            making.cancel()
            stopping.cancel()

    async def _make(self) -> shimlink.Shim:
        around, launch = self._around, self.launch
        carrier = asyncio.create_task(around.carriers.begin(launch, around.address(2)[0]))
        self._wait_for("the job's files")
        made = self._made = await around.recipe_for(launch.job, launch.run, self.directory)
        self._wait_for("the standby server" if made.modules else "")
        place = Place(ranks=len(launch.ranks), gpus=around.slots.gpus(self._slots))
        server, self._cold_reason = await around.standbys.ready(launch.job, made, place)
        if earlier := around.predecessors(*self.key):
            self._wait_for("an earlier attempt to be dead")
            await asyncio.wait([asyncio.ensure_future(end) for end in earlier])
        await asyncio.to_thread(preparation.fence, launch)
        self._address, interface = around.address(len(launch.nodes))
        self._wait_for("the states to restore from memory" if launch.memory else "")
        await carrier
        await around.carriers.prepare(launch, around.address(2)[0])
        self._wait_for("")
        site = preparation.Site(
            node=around.settings.node, directory=self.directory, slots=self._slots,
            gpus=around.slots.gpus(self._slots), address=self._address, interface=interface,
            carrier=str(around.carriers.directory(launch.job)) if launch.secret else "",
        )  # fmt: skip
        file = preparation.launch_file(launch, made, site)
        shim = await shimlink.launch(self.directory, file, standby=server)
        around.standbys.spent(launch.job, made, place)
        return shim

    async def _adopt(self) -> shimlink.Shim | None:
        """What became of a shim that was started: a link to it, or None when all is over."""
        self._address = self._address or self._around.address(len(self.launch.nodes))[0]
        self._around.carriers.adopt(self.launch, self._around.address(2)[0])
        while True:
            try:
                found = await shimlink.adopt(self.directory, self.marker, timeout_s=_ADOPT_TIMEOUT_S)
            except TimedOut as error:
                # Stopped or starved, but alive: its ranks may be training. Only an order to end ends it.
                if self._stop is not None:
                    raise
                self._reason = str(error)
                self._around.changed()
                continue
            self._reason = ""
            if isinstance(found, shimlink.Ending):
                await self._around.carriers.look(self.launch.job)
                self._finish(found)
                return None
            return found

    async def _serve(self, shim: shimlink.Shim) -> shimlink.Shim | None:
        """Until the shim is gone; a new link when only the old one broke."""
        self.shim = shim
        self._take(shim.status)
        self.found.set()
        follow = asyncio.create_task(self._follow(shim))
        try:
            while not follow.done():
                self._poke.clear()
                await self._act(shim)
                poked = asyncio.create_task(self._poke.wait())
                await asyncio.wait({poked, follow}, timeout=_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
                poked.cancel()
            follow.result()
            try:
                ending = await shim.ended(timeout_s=_FAREWELL_S)
                await self._around.carriers.look(self.launch.job)
                self._finish(ending)
            except TimedOut:
                return await self._adopt()
            return None
        finally:
            follow.cancel()
            self.shim = None
            shim.close()

    async def _follow(self, shim: shimlink.Shim) -> None:
        async for status in shim.changes():
            self._take(status)
            self._poke.set()

    async def _act(self, shim: shimlink.Shim) -> None:
        """Make the newest orders true."""
        launch, phase = self.launch, shim.status.phase
        try:
            if self._stop is not None:
                await self._end(shim, *self._stop)
                return
            await self._around.carriers.meet(launch)
            if launch.go and launch.master is not None and phase == "prepared" and not self._went:
                self._went = True
                address, port = launch.master
                store = shim.status.store if launch.node_rank == 0 else True
                self.progress.started_s = self._around.clock.monotonic()
                self.solitude = Solitude(alone_s=self.solitude.alone_s, leased_s=self.solitude.leased_s)
                self._take(await shim.go(address, port, store=store))
        except KeepstepError as error:
            # A shim that died shows in what follows; one that is only slow is told again at the next order.
            _log.warning("attempt %s/%d: %s", *self.key, error)
            self._went = self._went and not isinstance(error, TimedOut)

    async def _end(self, shim: shimlink.Shim, reason: str, grace_s: float) -> None:
        if self._told_grace_s is not None and grace_s >= self._told_grace_s:
            return
        self._reason = reason
        if grace_s > 0:
            run = preparation.read_run(self.launch.run)
            self._take(await shim.end(run.stop.signal, grace_s=grace_s))
        else:
            running = [state.pid for state in self._states if state.state == "running" and state.pid]
            await let_finish(running, self._around.clock, within_s=self._finish_s)
            self._take(await shim.end("KILL"))
        self._told_grace_s = grace_s

    # ---------------------------------------------------------------- what is seen

    def _take(self, status: ShimStatus) -> None:
        before = (self._phase, self._alive, self._states)
        self._phase = (
            "ending" if status.phase == "dead" else status.phase
        )  # dead is said with the result only
        self._alive, self._warm = status.alive, status.warm
        if status.note and not status.warm:
            self._cold_reason = status.note
        if self.launch.node_rank == 0 and status.master_port is not None:
            self._master = self._address, status.master_port
        if status.phase not in {"preparing", "prepared"}:
            self._went = True
            if self.progress.started_s is None:
                self.progress.started_s = self._around.clock.monotonic()
        self._take_states(status.ranks)
        if before != (self._phase, self._alive, self._states):
            self._around.changed()

    def _take_states(self, states: Iterable[RankState]) -> None:
        before = {state.rank: state.state for state in self._states}
        self._states = tuple(states) or self._states
        started = [s for s in self._states if s.state == "running" and before.get(s.rank) == "waiting"]
        if started:
            self._tell("rank_started", f"ranks {_listed(started)} started {'warm' if self._warm else 'cold'}")
        ended = [s for s in self._states if s.state == "exited" and before.get(s.rank) != "exited"]
        for state in report.worth_evidence(self._states, self._evidence):
            self._evidence[state.rank] = collect(self.directory, state.rank)
        if clean := [s for s in ended if not report.failed(s)]:
            self._tell("rank_exited", f"ranks {_listed(clean)} have finished")
        for state in sorted((s for s in ended if report.failed(s)), key=lambda s: s.order or 0):
            error = self._evidence.get(state.rank, Evidence()).error
            text = f"rank {state.rank} {report.how_it_ended(state)}" + (f": {error}" if error else "")
            self._tell("rank_exited", text)

    def _finish(self, ending: shimlink.Ending) -> None:
        if self.shim is not None:
            self.look(points=True)
        self._evidence.clear()  # by now the logs are whole
        begun = (self.directory / IDENTITY).exists()
        reason = self._reason or ending.reason if begun else "it was given up before anything was started"
        if begun:
            self._take_states(ending.ranks or report.lost(self.launch.ranks))
        if ending.shim_died and begun:
            text = f"the shim was killed; {ending.swept} processes of the attempt were ended after it"
            self._tell("orphans", text)
        again = any(report.failed(state) for state in self._states)
        self._around.standbys.learn(self.launch.job, self._made, self.directory, load=again)
        self._close("dead", self._stop[0] if self._stop else reason)

    async def _give_up(self, reason: str) -> None:
        """Nothing can be started or followed any more: make sure that nothing is left, and say why."""
        while (swept := await shimlink.sweep(self.marker, timeout_s=_CONFIRM_TIMEOUT_S)).left:
            self._phase, self._alive = "ending", swept.left
            self._reason = f"{reason}; {swept.left} processes of it cannot be killed"
            self._around.changed()
            await asyncio.sleep(_RETRY_S)
        if self._went:
            self._states = report.lost(self.launch.ranks)
        self._close("dead" if self._went else "refused", reason)

    def bury(self, phase: str, reason: str) -> None:
        """It never ran here, and never will."""
        if phase == "dead":
            self._states = report.lost(self.launch.ranks)
        self._close(phase, reason)

    def _close(self, phase: str, reason: str) -> None:
        self._phase, self._reason, self._alive = phase, reason, 0
        status = self._status()
        outcome = report.Outcome(boot=self._around.boot, at=self._around.clock.monotonic(), status=status)
        self.outcome = outcome
        try:
            if self.directory.is_dir():
                for socket in self.directory.glob("control-*.sock"):  # of ranks that could not remove theirs
                    socket.unlink(missing_ok=True)
                (self.directory / LAUNCH).unlink(missing_ok=True)  # with secrets, if no shim came to read it
                durable.write(self.directory / "outcome.json", msgspec.json.encode(outcome))
        except OSError as error:
            _log.warning("%s cannot be written: %s", self.directory / "outcome.json", error)
        _log.info("attempt %s/%d is %s%s", *self.key, phase, f": {reason}" if reason else "")
        self._around.changed()

    def look(self, *, points: bool) -> bool:
        """Read the beacons. True: a rank completed a step since the last look."""
        if self.shim is None:
            return False
        wanted = points and self.launch.node_rank in {0, len(self.launch.nodes) - 1}
        look = self.progress.look(self.shim.beacons, self._now_ns(), points=wanted)
        if look.points:
            self._around.tell("points", *self.key, {"points": list(look.points)})
        for found in self._evaluations.news() if points else ():
            self._around.tell("evaluation", *self.key, found)
        if look.first:
            self._around.changed()
        if points and self._warm and not self._learnt and any(self.directory.glob("learnt-*.json")):
            self._learnt = True
            self._around.standbys.learn(self.launch.job, self._made, self.directory, load=True)
        return look.stepped

    def feel(self, elapsed_s: float) -> None:
        """Whether its ranks live and move, `elapsed_s` after the last time."""
        if self.shim is not None and self._phase == "running":
            self.progress.refresh(self.shim.beacons)
            if self.pulses.look(self._states, self.shim.beacons, self.progress.records, elapsed_s):
                self._around.changed()

    # ---------------------------------------------------------------- reports

    def status(self) -> AttemptStatus:
        if self.outcome is not None:
            return self.outcome.aged(self._around.clock.monotonic(), self._around.boot)
        return self._status()

    def _status(self) -> AttemptStatus:
        if self.shim is not None:
            self.progress.refresh(self.shim.beacons)
        beacons = self.shim.beacons.values() if self.shim is not None else ()
        now_ns = self._now_ns()
        return AttemptStatus(
            job=self.launch.job, attempt=self.launch.attempt, incarnation=self.launch.incarnation,
            phase=self._phase, reason=self._reason, master=self._master, warm=self._warm,
            cold_reason="" if self._warm else self._cold_reason, alive=self._alive,
            unfenced_s=self.solitude.unfenced_s if self._phase == "running" else None,
            ranks=tuple(
                report.rank_status(
                    state, self.progress.records.get(state.rank), self._evidence.get(state.rank),
                    self.pulses.ranks.get(state.rank), now_ns,
                    self._around.gpu_of(self._slots, state.local_rank),
                )
                for state in self._states
            ),
            losses=tuple(self.progress.losses), phases=phases(beacons), bubble_s=bubble_s(beacons),
        )  # fmt: skip

    def _now_ns(self) -> int:
        return int(self._around.clock.monotonic() * 1e9)

    def _wait_for(self, what: str) -> None:
        self._reason = f"waiting for {what}" if what else ""
        self._around.changed()

    def _tell(self, kind: str, text: str) -> None:
        self._around.tell(kind, *self.key, {"text": text})


def _listed(states: Iterable[RankState]) -> str:
    ranks = sorted(state.rank for state in states)
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(str(rank) for rank in ranks)
