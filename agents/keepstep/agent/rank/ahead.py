"""Processes started ahead: one for each local rank, and one for the rendezvous store.

What has touched a GPU must not be forked from. There a standby is a process of its own that has done the
imports (and has its CUDA context, if that is wanted) and waits on a socket to become a rank; the same code
makes it the script that makes a forked one. All of them are children of a leader that has loaded nothing.
Asked for an attempt, the leader becomes its shim: so the ranks' parent is the shim from the beginning, and
they die with it. A leader serves one attempt; the agent starts the next one at once.
"""

import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import become, preload, processes, rendezvous, spawn
from .marker import entitle, overwrite
from .protocol import LaunchFile
from .turn import Turn

_LOAD_S = 300.0
_MAIN = str(Path(__file__).with_name("__main__.py"))


@dataclass(slots=True)
class Waiting:
    pid: int
    held: int  # pidfd
    peer: socket.socket


@dataclass(kw_only=True)
class Crew:
    """The leader's hold on what waits. `store` is the one that becomes the rendezvous store."""

    ranks: list[Waiting]
    store: Waiting | None
    loaded: become.Loaded
    outcome: preload.Outcome

    @property
    def pss_bytes(self) -> int:
        waiting = [*self.ranks, *([self.store] if self.store else [])]
        return sum(processes.pss_bytes(one.pid) for one in waiting) + processes.pss_bytes(os.getpid())

    def why_too_few(self, launch: LaunchFile) -> str:
        alive = [one for one in self.ranks if not select.select([one.held], [], [], 0)[0]]
        if len(alive) >= len(launch.ranks) and alive == self.ranks:
            return ""
        return f"{len(alive)} processes wait for {len(launch.ranks)} ranks"

    def dismiss(self, keep: int) -> None:
        """End those that are not needed."""
        for one in self.ranks[keep:]:
            _end(one)
        del self.ranks[keep:]

    def rank(self, k: int, launch: LaunchFile, around: spawn.Surroundings) -> tuple[int, int]:
        """Let the k-th become a rank; its pid and a pidfd. Errors: OSError when it is gone."""
        one = self.ranks[k]
        order = {
            "argv": launch.argv, "interpreter": launch.interpreter, "cwd": launch.cwd, "umask": launch.umask,
            "limits": launch.limits, "env": around.env, "marker": launch.marker, "keep": list(around.keep),
            "cgroup": str(around.cgroup or ""), "account": str(around.account or ""),
        }  # fmt: skip
        _send(one.peer, order, [around.output, *around.keep])
        one.peer.close()
        return one.pid, one.held

    def serve(self, launch: LaunchFile, listening: int, told: int, host: str) -> tuple[int, int]:
        """Let the last one become the store. Errors: OSError when it is gone."""
        assert self.store is not None
        _send(self.store.peer, {"store": host, "marker": launch.marker}, [listening, told])
        self.store.peer.close()
        one, self.store = self.store, None
        return one.pid, one.held

    def let_go(self) -> None:
        """In a child that is not one of them."""
        for one in [*self.ranks, *([self.store] if self.store else [])]:
            one.peer.close()


def gather(directory: Path, wanted: preload.Wanted, interpreter: tuple[str, ...]) -> Crew:
    """Start them and wait until all are loaded. Errors: Unfit."""
    ranks = [_start(directory, interpreter, k) for k in range(wanted.ranks)]
    store = _start(directory, interpreter, -1)
    deadline_s = time.monotonic() + _LOAD_S
    said = [_heard(one, deadline_s) for one in (*ranks, store)]
    told = said[0]
    loaded = become.Loaded(
        **{
            **told["loaded"],
            "interpreter": interpreter,
            "modules": frozenset(told["loaded"]["modules"]),
            "reads": frozenset(told["loaded"]["reads"]),
        }
    )
    outcome = preload.Outcome(
        **{
            **told["outcome"],
            "reads": loaded.reads,
            "files": {path: tuple(stamp) for path, stamp in told["outcome"]["files"].items()},
        }
    )
    load_s = max(one["outcome"]["load_s"] for one in said)
    return Crew(ranks=ranks, store=store, loaded=loaded, outcome=replace(outcome, load_s=load_s))


def wait(descriptor: int, directory: Path, k: int, load: Callable[[preload.Wanted], Any]) -> None:
    """The process itself: load, tell, wait, become. It dies with the leader, so that it waits for ever."""
    peer = socket.socket(fileno=descriptor)
    wanted = preload.Wanted.read(directory)
    if k < 0:
        wanted = replace(wanted, learnt=(), context=False)
    try:
        loaded, outcome = load(wanted)
        if wanted.context:
            _open_device(k)
    except (preload.Unfit, ImportError) as error:
        _send(peer, {"unfit": str(error)}, [])
        os._exit(1)
    plain = asdict(loaded) | {"modules": sorted(loaded.modules), "reads": sorted(loaded.reads)}
    _send(peer, {"loaded": plain, "outcome": asdict(outcome) | {"reads": []}}, [])
    try:
        order, descriptors = _receive(peer)
    except ConnectionResetError:  # it is not needed
        os._exit(0)
    peer.close()
    if not overwrite(order["marker"]):
        os._exit(1)
    if "store" in order:
        spawn.descriptors(os.dup(2), tuple(descriptors))
        listening, told = descriptors
        raise Turn(lambda: rendezvous.serve(listening, told, order["store"]))
    raise Turn(lambda: _become(order, descriptors, loaded))


def _become(order: Mapping[str, Any], descriptors: list[int], loaded: become.Loaded) -> None:
    entitle([*order["interpreter"], *order["argv"]])
    output, *kept = _renumbered(descriptors, order["keep"])
    around = spawn.Surroundings(
        env=order["env"], output=output, keep=tuple(kept),
        cgroup=Path(order["cgroup"]) if order["cgroup"] else None,
        account=Path(order["account"]) if order["account"] else None,
    )  # fmt: skip
    env = spawn.arrive(around, cwd=order["cwd"], umask=order["umask"], limits=order["limits"])
    script = become.Script(
        argv=tuple(order["argv"]), interpreter=tuple(order["interpreter"]), env=env, account=around.account
    )
    become.become(script, loaded)


def _renumbered(have: list[int], wanted: list[int]) -> list[int]:
    """The output's descriptor, and the others under the numbers that the environment names."""
    high = max(*have, *wanted) + 1  # first all out of the way, then into place
    output, *kept = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, high) for one in have]
    for one, number in zip(kept, wanted, strict=True):
        os.dup2(one, number)
    return [output, *wanted]


def _open_device(k: int) -> None:
    """The CUDA context of the k-th device; the current device stays the first, as in a fresh process."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with torch.cuda.device(k):
            torch.zeros(1, device="cuda")


def _start(directory: Path, interpreter: tuple[str, ...], k: int) -> Waiting:
    ours, theirs = socket.socketpair()
    number = theirs.fileno()

    def child() -> None:
        os.set_inheritable(number, True)
        spawn.execute((*interpreter, _MAIN, "ahead", str(number), str(directory), str(k)), dict(os.environ))

    pid, held = spawn.fork(child)
    theirs.close()
    return Waiting(pid, held, ours)


def _heard(one: Waiting, deadline_s: float) -> dict[str, Any]:
    one.peer.settimeout(max(0.1, deadline_s - time.monotonic()))
    try:
        told, _ = _receive(one.peer)
    except OSError as error:
        raise preload.Unfit(f"a process that was started ahead did not load: {error}") from error
    if "unfit" in told:
        raise preload.Unfit(str(told["unfit"]))
    one.peer.settimeout(None)
    return told


def _send(peer: socket.socket, message: dict[str, Any], descriptors: list[int]) -> None:
    data = json.dumps(message).encode() + b"\n"
    sent = socket.send_fds(peer, [data], descriptors) if descriptors else 0
    if sent < len(data):
        peer.sendall(data[sent:])


def _receive(peer: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, descriptors = b"", []
    while not data.endswith(b"\n"):
        part, more, _, _ = socket.recv_fds(peer, 1 << 16, 16)
        if not part:
            raise ConnectionResetError("it ended")
        data += part
        descriptors += more
    message: dict[str, Any] = json.loads(data)
    return message, descriptors


def _end(one: Waiting) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(one.held, signal.SIGKILL)
    one.peer.close()
