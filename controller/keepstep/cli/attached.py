"""An agent that belongs to a terminal: started by `keepstep run`, gone when it goes.

It is a child process, so it and its ranks have this shell's folder, environment, umask and limits. It looks
whether its parent is still there; when this process ends, however it ends, the agent ends its ranks and
itself. What `kill -9` of both leaves is found by the marker and ended by whoever comes next.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from keepstep.agent.rank import marker
from keepstep.agent.rank.kill import Purge
from keepstep.cli.client import Client, ref
from keepstep.cli.service import log_tail
from keepstep.core.clock import SystemClock
from keepstep.core.errors import KeepstepError, NotFound, TimedOut
from keepstep.core.home import Home, lives, start_ticks

_JOIN_WITHIN_S = 30.0
_END_WITHIN_S = 15.0
_BETWEEN_SIGNALS_S = 0.05  # two at once would be one


@dataclass(slots=True, kw_only=True)
class AttachedAgent:
    node: str
    folder: Path
    child: "subprocess.Popen[bytes]"

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs"

    @property
    def alive(self) -> bool:
        return self.child.poll() is None

    def kill_ranks(self) -> None:
        """No more grace: the first signal tells the agent to end its ranks and leave, the second at once."""
        for _ in range(2):
            if self.alive:
                self.child.terminate()
                time.sleep(_BETWEEN_SIGNALS_S)

    def end(self) -> None:
        """End agent and ranks, make sure of it, and take their folder away."""
        self.kill_ranks()
        try:
            self.child.wait(_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait(_END_WITHIN_S)
        sweep(self.folder, self.node)
        shutil.rmtree(self.folder, ignore_errors=True)


def start(home: Home, client: Client, *, slots: int) -> AttachedAgent:
    """Start an agent of our own and wait until the controller knows it. Errors: TimedOut, KeepstepError."""
    tidy(home)
    node = f"run-{os.uname().nodename.split('.')[0]}-{os.getpid()}"
    folder = home.runs / str(os.getpid())
    folder.mkdir(mode=0o700, parents=True)
    (folder / "owner.json").write_text(
        json.dumps({"pid": os.getpid(), "start_ticks": start_ticks(os.getpid()), "node": node})
    )
    log = os.open(folder / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        child = subprocess.Popen(
            command(node, folder, _endpoint(home, client, folder), slots),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C comes to us alone, and we pass it on in the job's own way
        )
    finally:
        os.close(log)
    agent = AttachedAgent(node=node, folder=folder, child=child)
    try:
        _await_joined(client, agent)
    except BaseException:
        agent.end()
        raise
    return agent


def command(node: str, folder: Path, endpoint: Path, slots: int) -> list[str]:
    return [
        sys.executable, "-m", "keepstep.agent", "--node", node, "--dir", str(folder),
        "--endpoint-file", str(endpoint), "--pool", "run", "--slots", str(slots),
        "--address", "127.0.0.1", "--interface", "lo", "--attached",
    ]  # fmt: skip


def tidy(home: Home) -> None:
    """Take away what runs left that were killed: their processes, then their folders."""
    for folder in home.runs.glob("*") if home.runs.is_dir() else ():
        try:
            owner = json.loads((folder / "owner.json").read_text())
            pid, ticks, node = int(owner["pid"]), int(owner["start_ticks"]), str(owner["node"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being made at this moment, or not ours
        if not lives(pid, ticks):
            sweep(folder, node)
            shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path, node: str, *, within_s: float = 10.0) -> None:
    """Kill every process that any attempt under `folder` has left. Usually there is none."""
    markers = [
        f"{path.parent.name}/{path.name}/{node}" for path in folder.glob("jobs/*/*") if path.name.isdigit()
    ]
    if not markers:
        return
    clock, purge = SystemClock(), Purge()
    deadline = clock.monotonic() + within_s
    while clock.monotonic() < deadline:
        if not purge.round(marker.bearers(markers)):
            break
        time.sleep(0.02)
    purge.tidy()


def _endpoint(home: Home, client: Client, folder: Path) -> Path:
    """Where the agent finds the controller: the machine's own announces itself anew when it comes back."""
    if client.name == "local":
        return home.controller_file
    path = folder / "endpoint.json"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"url": client.url, "token": client.token}, file)
    return path


def _await_joined(client: Client, agent: AttachedAgent) -> None:
    clock = SystemClock()
    deadline = clock.monotonic() + _JOIN_WITHIN_S
    while True:
        try:
            if client.get(f"/nodes/{ref(agent.node)}").get("connected"):
                return
        except NotFound:
            pass
        if not agent.alive:
            raise KeepstepError(
                "the agent of this run ended while it started",
                why=_ended(agent.child.returncode),
                next=f"Its last lines:\n{log_tail(agent.folder / 'agent.log')}",
            )
        if clock.monotonic() > deadline:
            raise TimedOut(
                f"the controller does not know this run's agent after {_JOIN_WITHIN_S:.0f} s",
                where=client.url,
                next=f"The agent's last lines:\n{log_tail(agent.folder / 'agent.log')}",
            )
        time.sleep(0.03)


def _ended(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
