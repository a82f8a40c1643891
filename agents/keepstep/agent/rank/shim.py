"""The shim: owns the ranks of one attempt on one node, and outlives the agent that started it.

One thread, one loop: sockets, pipes, exits, and a clock. Agents come and go over a Unix socket; the
newest is told what changes. Ranks die with the shim, and the shim is the parent of whatever their
descendants leave behind, so "dead" can be said truthfully: it is said only when not one process of the
attempt is left.

    preparing --store settled--> prepared --go--> running --all exited, or end--> ending --nobody left--> dead
"""

import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import ahead, become, lines, processes
from .gang import Gang
from .kill import Purge
from .marker import bearers, entitle
from .processes import Process
from .protocol import (
    IDENTITY,
    LAUNCH,
    RESULT,
    SOCKET,
    LaunchFile,
    ShimStatus,
    write_atomically,
)  # fmt: skip
from .rendezvous import Store

FORGOTTEN_S = 600.0  # prepared, and no agent has been connected for so long: nobody will say go
_ROUND_S, _ROUND_S_MAX = 0.01, 1.0  # between two rounds of killing
_DYING_S = 0.05  # the same while ranks that were killed are on their way out: their exits wake the loop
_FAREWELL_S = 2.0  # for the last push to be taken
_MAIN = str(Path(__file__).with_name("__main__.py"))


def main(directory: Path, loaded: become.Loaded | None, crew: ahead.Crew | None = None) -> None:
    """`loaded`: ranks are forked from this process, or `crew` has processes that wait to become them."""
    mine = directory / f"{LAUNCH}.taken"
    (directory / LAUNCH).rename(
        mine
    )  # of two shims for one launch, started by an impatient agent, one gets it
    launch = LaunchFile.read(mine)
    mine.unlink()  # it holds the job's secrets
    processes.adopt_orphans()
    if loaded is not None:
        entitle([*launch.interpreter[:1], "keepstep-shim", launch.marker])
    Shim(directory, launch, loaded, crew).run()
    sys.stdout.flush()
    os._exit(0)  # the teardown of what a standby server had loaded would cost seconds, and be for nothing


class Shim:
    def __init__(
        self, directory: Path, launch: LaunchFile, loaded: become.Loaded | None, crew: ahead.Crew | None
    ) -> None:
        self._directory, self._launch = directory, launch
        self._note = become.why_cold(launch, loaded) if loaded else ""
        self._note = self._note or (crew.why_too_few(launch) if crew else "")
        self._loaded = None if self._note else loaded
        self._forkable, self._crew = loaded is not None, crew
        if crew is not None:
            crew.dismiss(0 if self._note else len(launch.ranks))
        self._phase = "preparing"
        self._alive = 0
        self._gang = Gang(directory, launch)
        self._store = Store(launch)
        self._cgroup = _cgroup(launch)
        self._peers: list[lines.Peer] = []
        self._pushed: tuple[lines.Peer | None, ShimStatus | None] = (None, None)
        self._seen_s = time.monotonic()  # when an agent was last connected
        self._exits: list[tuple[int, int, int]] = []
        self._reaping = False
        self._terminated = False
        self._deadline_s: float | None = None  # of the grace given
        self._purge: Purge | None = None
        self._round_s, self._pause_s = 0.0, _ROUND_S
        self._selector = selectors.DefaultSelector()
        self._listen()

    def run(self) -> None:
        if self._launch.store:
            self._store.start(
                forked=self._forkable, main=_MAIN, let_go=self._let_go,
                waiting=partial(self._crew.serve, self._launch) if self._crew is not None else None,
            )  # fmt: skip
        if self._store.ready is not None:
            self._selector.register(self._store.ready, selectors.EVENT_READ, self._settle)
        else:
            self._phase = "prepared"
        while True:
            for key, _ in self._selector.select(self._timeout_s()):
                if key.fileobj in self._selector.get_map():  # not dropped by what came before in this turn
                    key.data()
            self._take_exits()
            self._advance()
            if self._phase == "dead":
                return self._finish()
            self._tell()

    # -- what wakes the loop

    def _listen(self) -> None:
        me = processes.itself()
        identity = {"pid": me.pid, "start_ticks": me.start_ticks, "marker": self._launch.marker}
        write_atomically(self._directory / IDENTITY, identity)
        self._wake, waker = socket.socketpair()
        self._waker = waker
        for end in (self._wake, waker):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, self._reap)
        signal.signal(signal.SIGTERM, self._terminate)
        for ignored in (signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, lambda *_: None)  # not SIG_IGN, which ranks would inherit
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self._listener = lines.bind(self._directory / SOCKET)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: self._wake.recv(4096))
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _let_go(self) -> None:
        """In a child: close what would otherwise close somebody else's descriptors later."""
        self._selector.close()
        for end in (self._wake, self._waker, self._listener, *(peer.socket for peer in self._peers)):
            end.close()
        if self._crew is not None:
            self._crew.let_go()

    def _reap(self, *_: object) -> None:
        """Runs as soon as the interpreter can, and never inside of itself, so exits keep their order.

        What ends meanwhile is reaped here or by the loop, which the same signal wakes.
        """
        if self._reaping:
            return
        self._reaping = True
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                self._exits.append((*found, time.monotonic_ns()))
        except ChildProcessError:  # there are no more
            pass
        finally:
            self._reaping = False

    def _terminate(self, *_: object) -> None:
        self._terminated = True

    def _timeout_s(self) -> float:
        now = time.monotonic()
        if self._purge is not None:
            return max(0.0, self._round_s - now)
        if self._deadline_s is not None:
            return max(0.0, self._deadline_s - now)
        return 5.0

    # -- agents

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again, or no descriptor is left for it
            return
        peer = lines.Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._converse(peer))

    def _converse(self, peer: lines.Peer) -> None:
        peer.flush()
        for request in peer.read():
            self._answer(peer, request)

    def _answer(self, peer: lines.Peer, request: dict[str, Any]) -> None:
        try:
            self._obey(request)
            answer: dict[str, Any] = {"ok": True}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answer |= {"answer": request.get("do"), "n": request.get("n")}
        if request.get("do") == "hello":
            self._peers.sort(key=lambda other: other is peer)  # the newest is last
            launch = self._launch
            answer["hello"] = {
                "pid": os.getpid(),
                "marker": launch.marker,
                "ranks": [state.rank for state in self._gang.states],  # in the order of the descriptors
            }
            peer.send(answer | {"status": self._status().as_dict()}, self._gang.beacons)
        else:
            peer.send(answer | {"status": self._status().as_dict()})

    def _obey(self, request: dict[str, Any]) -> None:
        match request.get("do"):
            case "hello":
                pass
            case "status":
                self._count()
            case "go":
                if self._phase in ("running", "ending"):
                    return  # said before: the status says what happened
                if self._phase != "prepared":
                    raise ValueError(f"not prepared, but {self._phase}")
                address, port = request["master"]
                self._go(str(address), int(port), request.get("store"))
            case "end":
                self._end(_number(request.get("signal", "KILL")), float(request.get("grace_s", 0.0)))
            case "signal":
                self._gang.send(_number(request["signal"]), request.get("ranks"))
            case other:
                raise ValueError(f"unknown request {other!r}")

    def _tell(self) -> None:
        """Push the newest state to the newest agent, if it is new to it and the agent keeps up."""
        for peer in [peer for peer in self._peers if not peer.open]:
            self._selector.unregister(peer.socket)
            peer.close()
            self._peers.remove(peer)
        if not self._peers:
            return
        self._seen_s = time.monotonic()
        newest, status = self._peers[-1], self._status()
        if newest.idle and self._pushed != (newest, status):
            newest.send({"status": status.as_dict()})
            self._pushed = (newest, status)
        for peer in self._peers:
            wanted = selectors.EVENT_READ | (0 if peer.idle else selectors.EVENT_WRITE)
            key = self._selector.get_key(peer.socket)
            if key.events != wanted:
                self._selector.modify(peer.socket, wanted, key.data)

    def _status(self) -> ShimStatus:
        return ShimStatus(
            phase=self._phase, master_port=self._store.port, store=self._store.listens, alive=self._alive,
            warm=self._loaded is not None, note="; ".join(filter(None, (self._note, self._store.note))),
            ranks=self._gang.states,
        )  # fmt: skip

    # -- the life of the attempt

    def _settle(self) -> None:
        assert self._store.ready is not None
        self._selector.unregister(self._store.ready)
        self._store.settle()
        if self._phase == "preparing":
            self._phase = "prepared"

    def _go(self, address: str, port: int, store: bool | None) -> None:
        added = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        if store is not None:
            added["TORCHELASTIC_USE_AGENT_STORE"] = str(store)
        crew = self._crew if self._loaded is not None else None
        self._gang.start(
            added=added, loaded=self._loaded, cgroup=self._cgroup, let_go=self._let_go, crew=crew
        )
        for output in self._gang.outputs:
            self._selector.register(output.pipe, selectors.EVENT_READ, _pump(self._selector, output))
        self._alive = len(self._gang.states)
        self._phase = "running"

    def _end(self, number: int, grace_s: float) -> None:
        self._phase = "ending"
        if number == signal.SIGKILL or not self._gang.running:
            self._kill()
            return
        self._gang.send(number)
        self._gang.send(signal.SIGCONT)  # a stopped rank would not see it
        deadline_s = time.monotonic() + grace_s
        self._deadline_s = deadline_s if self._deadline_s is None else min(self._deadline_s, deadline_s)

    def _kill(self) -> None:
        if self._purge is None:
            self._purge = Purge(self._cgroup)
            self._store.end()  # nobody meets any more

    def _take_exits(self) -> None:
        self._reap()
        exits, self._exits = self._exits, []
        for pid, status, at_ns in exits:
            if pid == self._store.pid:
                self._store.ended()
            else:
                self._gang.exited(pid, status, at_ns)
        if exits and self._purge is None:
            self._count()
        if exits and not self._gang.running:
            self._round_s = 0.0

    def _advance(self) -> None:
        now = time.monotonic()
        if self._terminated:
            self._terminated = False
            self._end(_number(self._launch.stop.signal), self._launch.stop.grace_s)
        match self._phase:
            case "preparing" | "prepared":
                if now - self._seen_s > FORGOTTEN_S:
                    self._end(signal.SIGKILL, 0.0)
            case "running":
                if not self._gang.running:
                    self._end(signal.SIGKILL, 0.0)
            case "ending":
                if not self._gang.running or (self._deadline_s is not None and now >= self._deadline_s):
                    self._kill()
        if self._purge is not None and now >= self._round_s:
            self._alive = self._purge.round(self._victims())
            pause_s = max(self._pause_s, _DYING_S) if self._gang.running else self._pause_s
            self._round_s = time.monotonic() + pause_s
            self._pause_s = min(self._pause_s * 1.1, _ROUND_S_MAX)
            if self._alive == 0 and not self._gang.running and _childless():  # nor is the store left
                self._phase = "dead"

    def _victims(self) -> list[Process]:
        """Every process of the attempt but the store and this one, wherever it has gone."""
        tree = processes.descendants(os.getpid(), processes.table())
        known = {process.pid for process in tree} | {os.getpid(), self._store.pid or 0}
        own = [process for process in tree if process.pid != self._store.pid]
        return own + bearers([self._launch.marker], known)

    def _count(self) -> None:
        tree = processes.descendants(os.getpid(), processes.table())
        self._alive = sum(process.alive and process.pid != self._store.pid for process in tree)

    def _finish(self) -> None:
        """Nobody is left: the result is written, the agent is told."""
        assert self._purge is not None
        self._purge.tidy()
        self._gang.close_outputs()
        status = self._status()
        result = {"status": status.as_dict(), "killed": self._purge.killed}
        try:
            write_atomically(self._directory / RESULT, result)
        except OSError as error:  # a full disk: the agent that listens still learns it
            os.write(2, f"{RESULT} could not be written: {error}\n".encode())
        (self._directory / SOCKET).unlink(missing_ok=True)
        for peer in self._peers:
            peer.socket.settimeout(_FAREWELL_S)
            peer.send({"status": status.as_dict()})
            peer.flush()
            peer.close()


def _childless() -> bool:
    """The kernel's word: nothing descends from this process, however fast it forks."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def _pump(selector: selectors.BaseSelector, output: Any) -> Callable[[], None]:
    def pump() -> None:
        output.pump()
        if not output.open:
            selector.unregister(output.pipe)

    return pump


def _number(name: str) -> int:
    return int(signal.Signals[f"SIG{name.removeprefix('SIG')}"])


def _cgroup(launch: LaunchFile) -> Path | None:
    """A cgroup of its own where a folder was delegated; without one, the process tree has to do."""
    if not launch.cgroup:
        return None
    folder = Path(launch.cgroup, "keepstep-" + launch.marker.replace("/", "."))
    try:
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.kill").stat()
    except OSError:
        return None
    return folder
