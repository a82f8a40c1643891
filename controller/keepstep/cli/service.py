"""The controller of this machine: find it, start it, stop it.

It runs detached, one for each state folder (`keepstep.core.home`). Starting and stopping hold a lock, so two
`keepstep up` at once come to one controller. Nothing here waits without a deadline, and a controller that
does not come up is reported with the end of its log.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from keepstep.cli.client import Client
from keepstep.cli.rayed import NO_RAY, RayOptions
from keepstep.core.clock import SystemClock
from keepstep.core.errors import KeepstepError, TimedOut, Unreachable
from keepstep.core.home import Home, Running, lives, running_controller, start_ticks, starting

_LOG_BYTES_MAX = 16 << 20
_NOT_INHERITED = ("KEEPSTEP_CONTEXT", "KEEPSTEP_URL", "KEEPSTEP_TOKEN", "_KEEPSTEP_COMPLETE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a controller of this machine is started."""

    nodes: int = 1
    slots: int = 0  # of each node; 0: as many as the machine has GPUs, else processors
    host: str = "127.0.0.1"
    port: int = 0  # any that is free
    health_policy: str = ""  # a file over keepstep's own
    return_after_s: float = 30.0  # a lost node is started again
    ray: RayOptions = NO_RAY
    idle_exit_s: float = 0.0  # it ends after this long without jobs and clients; 0: never

    def arguments(self) -> list[str]:
        given = ["--nodes", str(self.nodes), "--host", self.host, "--port", str(self.port)]
        given += ["--return-after", str(self.return_after_s)]
        if self.slots:
            given += ["--slots", str(self.slots)]
        if self.health_policy:
            given += ["--health-policy", self.health_policy]
        if self.idle_exit_s:
            given += ["--idle-exit", str(self.idle_exit_s)]
        return given + self.ray.arguments()


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    running: Running
    fresh: bool  # False: it ran before


def find(home: Home) -> Running | None:
    return running_controller(home)


def client(running: Running) -> Client:
    return Client(url=running.url, token=running.token)


def not_running(home: Home) -> Unreachable:
    return Unreachable(
        "no controller runs on this machine", where=str(home.path), next="`keepstep up` starts one."
    )


def start(home: Home, options: Options, *, within_s: float = 60.0) -> Started:
    """Start the controller unless one runs; returns when it answers."""
    home.make()
    deadline = SystemClock().monotonic() + within_s
    with starting(home, within_s=within_s):
        running = find(home)
        if running is not None:
            _await_answer(home, running.pid, running.start_ticks, deadline)
            return Started(running=running, fresh=False)
        pid, ticks = _spawn(home, options)
        try:
            return Started(running=_await_answer(home, pid, ticks, deadline), fresh=True)
        except BaseException:
            _end(pid, ticks, signal.SIGTERM)  # half a controller helps nobody, whoever gave up on it
            raise


def stop(home: Home, *, force: bool, within_s: float = 60.0) -> Running | None:
    """Stop the controller and its local agents; returns what was stopped, None if nothing ran.

    Errors: Refused while jobs run, unless `force`.
    """
    if not home.path.is_dir():
        return None
    with starting(home, within_s=within_s):
        running = find(home)
        if running is None:
            return None
        try:
            client(running).post("/service/stop", {"force": force})
        except Unreachable:
            if not force:
                raise
            _end(running.pid, running.start_ticks, signal.SIGTERM)
        if not _await_end(running, within_s):
            if not force:
                raise TimedOut(
                    f"the controller (pid {running.pid}) was told to stop, still runs after {within_s:.0f} s",
                    where=str(home.log_file),
                    next="`keepstep down --force` ends it; jobs go on where their agents run.",
                )
            _end(running.pid, running.start_ticks, signal.SIGKILL)
            _await_end(running, 10.0)
        home.controller_file.unlink(missing_ok=True)
        return running


def log_tail(path: Path, lines: int = 12) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16_384))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(f"  | {line}" for line in text.splitlines()[-lines:])


def _spawn(home: Home, options: Options) -> tuple[int, int]:
    if home.log_file.exists() and home.log_file.stat().st_size > _LOG_BYTES_MAX:
        home.log_file.replace(home.log_file.with_suffix(".log.1"))
    command = [sys.executable, "-m", "keepstep.cli.main", "controller", "--home", str(home.path)]
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    with _log(home) as log:
        child = subprocess.Popen(
            [*command, *options.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=home.path,  # so that it keeps no other folder busy
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C and hang-up are not for it
        )
    child.returncode = 0  # it outlives this process on purpose: no warning about that
    return child.pid, start_ticks(child.pid) or 0


@contextmanager
def _log(home: Home) -> Iterator[int]:
    descriptor = os.open(home.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _await_answer(home: Home, pid: int, ticks: int, deadline: float) -> Running:
    clock = SystemClock()
    while True:
        running = find(home)
        if running is not None and client(running).healthy():
            return running
        if not lives(pid, ticks):
            raise KeepstepError(
                "the controller ended while it started",
                where=str(home.log_file),
                next=f"Its last lines:\n{log_tail(home.log_file)}",
            )
        if clock.monotonic() > deadline:
            raise TimedOut(
                f"the controller (pid {pid}) does not answer",
                where=str(home.log_file),
                next=f"Its last lines:\n{log_tail(home.log_file)}",
            )
        time.sleep(0.05)


def _await_end(running: Running, within_s: float) -> bool:
    clock = SystemClock()
    deadline = clock.monotonic() + within_s
    while lives(running.pid, running.start_ticks):
        if clock.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _end(pid: int, ticks: int, how: signal.Signals) -> None:
    if lives(pid, ticks):
        try:
            os.kill(pid, how)
        except ProcessLookupError:
            return
