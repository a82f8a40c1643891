"""The standby server: one process with the job's imports done, that forks shims.

It is loaded once and never becomes anything itself: one thread, no process group, CUDA untouched, every
object frozen out of the garbage collector so that its pages stay shared. A shim is forked twice, so that
it is nobody's child, and forks the ranks itself. A server that dies makes the next start slower and
nothing else.

It ends when it is told to, when its folder is gone, or when no agent has been connected for ten minutes
and no shim of it lives.
"""

import fcntl
import gc
import os
import selectors
import sys
import time
from pathlib import Path
from typing import Any

from . import ahead, become, lines, preload, processes, shim
from .marker import PLACEHOLDER, overwrite
from .protocol import LOG as SHIM_LOG
from .protocol import MARKER, write_atomically
from .spawn import redirect
from .turn import Turn

LOG, SOCKET, LOCK, STATE = "standby.log", "standby.sock", "standby.lock", "standby.json"
LONELY_S = 600.0
_TICK_S = 10.0
_WEIGH_EVERY_S = 60.0


def main(directory: Path) -> None:
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit("another standby server has this folder") from None
    me = processes.itself()
    state: dict[str, Any] = {"pid": me.pid, "start_ticks": me.start_ticks, "state": "loading", "why": ""}
    write_atomically(directory / STATE, state)
    try:
        wanted = preload.Wanted.read(directory)
        if wanted.ranks:
            crew = ahead.gather(directory, wanted, _interpreter())
            server = Server(directory, crew.loaded, crew.outcome, lock, crew)
        else:
            loaded, outcome = load(wanted)
            become.inventory()
            gc.collect()
            gc.freeze()
            server = Server(directory, loaded, outcome, lock)
    except (preload.Unfit, ImportError) as error:
        write_atomically(directory / STATE, state | {"state": "failed", "why": str(error)})
        raise SystemExit(f"unfit to fork ranks: {error}") from error
    write_atomically(directory / STATE, state | {"state": "ready"})
    server.serve()


def load(wanted: preload.Wanted) -> tuple[become.Loaded, preload.Outcome]:
    """Import what is wanted, and keep what a launch is compared with."""
    block = Path("/proc/self/environ").read_bytes().split(b"\0")
    start = dict(os.fsdecode(entry).partition("=")[::2] for entry in block if entry)
    outcome = preload.load(wanted)
    loaded = become.Loaded(
        interpreter=_interpreter(),
        env={name: value for name, value in start.items() if name != MARKER},
        changes={name: value for name, value in os.environ.items() if start.get(name) != value},
        modules=frozenset(name.partition(".")[0] for name in sys.modules),
        reads=outcome.reads,
        given=dict(wanted.given),
        context=wanted.context,
    )
    return loaded, outcome


def _interpreter() -> tuple[str, ...]:
    """Executable and flags that this process was started with; our words begin with the path of __main__."""
    own = str(Path(__file__).with_name("__main__.py"))
    return tuple(sys.orig_argv[: sys.orig_argv.index(own)])


class Server:
    def __init__(
        self,
        directory: Path,
        loaded: become.Loaded,
        outcome: preload.Outcome,
        lock: int,
        crew: ahead.Crew | None = None,
    ) -> None:
        self._directory, self._loaded, self._outcome, self._lock = directory, loaded, outcome, lock
        self._crew = crew
        self._peers: list[lines.Peer] = []
        self._shims: set[int] = set()  # pidfds
        self._stopped = False
        self._weighed: tuple[float, int] | None = None  # when, and its share of memory then
        self._selector = selectors.DefaultSelector()
        self._listener = lines.bind(directory / SOCKET)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def serve(self) -> None:
        seen_s = time.monotonic()
        while not self._stopped:
            for key, _ in self._selector.select(_TICK_S):
                if key.fileobj in self._selector.get_map():
                    key.data()
            for peer in [peer for peer in self._peers if not peer.open]:
                self._selector.unregister(peer.socket)
                peer.close()
                self._peers.remove(peer)
            if self._peers or self._shims:
                seen_s = time.monotonic()
            if time.monotonic() - seen_s > LONELY_S or not (self._directory / SOCKET).exists():
                break
        (self._directory / SOCKET).unlink(missing_ok=True)
        os._exit(0)  # the teardown of everything that is loaded would only copy pages

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        peer = lines.Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._converse(peer))

    def _converse(self, peer: lines.Peer) -> None:
        for request in peer.read():
            match request.get("do"):
                case "hello":
                    peer.send({"hello": {"pss_bytes": self._pss_bytes(), **hello(self._outcome)}})
                case "fork":
                    if self._crew is not None:
                        self._turn_into_shim(Path(request["dir"]), request["marker"], peer, self._crew)
                    peer.send(self._fork(Path(request["dir"]), request["marker"]))
                case "stop":
                    peer.send({"stopped": True})
                    self._stopped = True
                case other:
                    peer.send({"error": f"unknown request {other!r}"})

    def _pss_bytes(self) -> int:
        """Counting hundreds of megabytes of pages takes as long as a fork: not at every start."""
        if self._crew is not None:
            return self._crew.pss_bytes
        now = time.monotonic()
        if self._weighed is None or now - self._weighed[0] > _WEIGH_EVERY_S:
            self._weighed = now, processes.pss_bytes(os.getpid())
        return self._weighed[1]

    def _fork(self, directory: Path, marker: str) -> dict[str, Any]:
        """A shim for a launch directory, and its pid."""
        if (count := processes.threads()) != 1:
            return {"error": f"{count} threads: a fork would lose {count - 1}"}
        answer, told = os.pipe()
        middle = os.fork()
        if middle == 0:
            try:
                self._become_shim(directory, marker, told)
            except Exception:  # noqa: BLE001 - the outermost boundary of this process: no second server may run on
                os._exit(1)
        os.close(told)
        os.waitpid(middle, 0)
        said = os.read(answer, 32)
        os.close(answer)
        if not said:
            return {"error": f"the marker {marker} has no room in {len(PLACEHOLDER)} bytes"}
        try:
            held = os.pidfd_open(int(said))
        except OSError:
            return {"forked": int(said)}  # it has ended already; its folder says why
        self._shims.add(held)
        self._selector.register(held, selectors.EVENT_READ, lambda: self._forget(held))
        return {"forked": int(said)}

    def _become_shim(self, directory: Path, marker: str, told: int) -> None:
        if not overwrite(marker):
            os._exit(1)
        os.setsid()
        pid = os.fork()
        if pid:
            os.write(told, b"%d" % pid)
            os._exit(0)
        self._selector.close()
        for end in (self._listener, *(peer.socket for peer in self._peers)):
            end.close()
        os.closerange(3, max(int(entry) for entry in os.listdir("/proc/self/fd")) + 1)  # noqa: PTH208
        redirect(directory / SHIM_LOG)
        loaded = self._loaded
        raise Turn(lambda: shim.main(directory, loaded))

    def _turn_into_shim(self, directory: Path, marker: str, peer: lines.Peer, crew: ahead.Crew) -> None:
        """What waits stays this process's. It is no server from now on, and another may have the folder."""
        for name in (STATE, SOCKET):
            (self._directory / name).unlink(missing_ok=True)
        os.close(self._lock)
        if not overwrite(marker):
            peer.send({"error": f"the marker {marker} has no room in {len(PLACEHOLDER)} bytes"})
            os._exit(1)
        peer.send({"forked": os.getpid(), "spent": True})
        self._selector.close()
        for end in (self._listener, *(other.socket for other in self._peers)):
            end.close()
        redirect(directory / SHIM_LOG)
        raise Turn(lambda: shim.main(directory, crew.loaded, crew))

    def _forget(self, held: int) -> None:
        self._selector.unregister(held)
        self._shims.discard(held)
        os.close(held)


def hello(outcome: preload.Outcome) -> dict[str, Any]:
    """What an agent is told when it asks: also whether what was loaded is still what is on the disk."""
    return {
        "pid": os.getpid(), "loaded": outcome.loaded, "missing": outcome.missing,
        "unfit": dict(outcome.unfit), "reads": sorted(outcome.reads), "load_s": outcome.load_s,
        "changed": preload.changed(outcome.files),
    }  # fmt: skip
