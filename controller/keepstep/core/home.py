"""Where keepstep keeps its state on this machine, and which controller runs from there.

One folder a user (KEEPSTEP_HOME, else $XDG_STATE_HOME/keepstep) and at most one controller in it. The
controller writes `controller.json` when it is ready; whoever reads it checks that the process is still the
one that wrote it (pid and start time), so a file that a crash left behind is no controller. Whoever starts or
stops one holds `starting.lock` meanwhile. The file names a token, so it is readable by its owner only.
Standard library only.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from keepstep.core.clock import SystemClock
from keepstep.core.errors import KeepstepError, TimedOut


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    path: Path

    @property
    def controller_file(self) -> Path:
        return self.path / "controller.json"

    @property
    def log_file(self) -> Path:
        return self.path / "controller.log"

    @property
    def store_file(self) -> Path:
        return self.path / "store.db"

    @property
    def bundles(self) -> Path:
        return self.path / "bundles"

    @property
    def nodes(self) -> Path:
        """One folder for each local node's agent."""
        return self.path / "nodes"

    @property
    def runs(self) -> Path:
        """One folder for each `keepstep run` that is under way, named by its pid."""
        return self.path / "run"

    def make(self) -> "Home":
        """Make the folder, readable by its owner only."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise KeepstepError(
                "the state folder cannot be made",
                where=str(self.path),
                why=error.strerror or str(error),
                next="Set KEEPSTEP_HOME to a folder on a local disk that you may write.",
            ) from error
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """The controller of a home, as it announced itself."""

    url: str
    pid: int
    start_ticks: int  # a pid that was reused has another one
    token: str = field(repr=False)
    term: int


def find_home(environ: Mapping[str, str] | None = None) -> Home:
    """The folder that the environment names; it need not exist yet."""
    env = os.environ if environ is None else environ
    if named := env.get("KEEPSTEP_HOME"):
        return Home(path=Path(named).expanduser().absolute())
    state = env.get("XDG_STATE_HOME") or ""
    base = Path(state) if state.startswith("/") else Path("~/.local/state").expanduser()
    return Home(path=base / "keepstep")


def announce(home: Home, running: Running) -> None:
    """Write controller.json whole or not at all; called by the controller once it answers."""
    temporary = home.controller_file.with_suffix(f".{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(running), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(home.controller_file)


def withdraw(home: Home) -> None:
    """Take controller.json away if it is the calling process's own."""
    announced = _read(home)
    if announced is not None and announced.pid == os.getpid():
        home.controller_file.unlink(missing_ok=True)


def running_controller(home: Home) -> Running | None:
    """The controller that lives, None if there is none or only the file of a dead one."""
    announced = _read(home)
    return announced if announced is not None and lives(announced.pid, announced.start_ticks) else None


def start_ticks(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None if there is no such process or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold anything, brackets too
    return None if fields[0] in ("Z", "X") else int(fields[19])


def lives(pid: int, ticks: int) -> bool:
    return start_ticks(pid) == ticks


@contextmanager
def starting(home: Home, *, within_s: float) -> Iterator[None]:
    """Hold the right to start or stop the controller of a home, so that two never do at once."""
    descriptor = os.open(home.path / "starting.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    clock = SystemClock()
    deadline = clock.monotonic() + within_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if clock.monotonic() > deadline:
                raise TimedOut(
                    f"another keepstep has been starting or stopping the controller for {within_s:.0f} s",
                    where=str(home.path),
                    next="Look at controller.log there, or end that process.",
                )
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _read(home: Home) -> Running | None:
    try:
        found = json.loads(home.controller_file.read_text())
        return Running(
            url=str(found["url"]),
            pid=int(found["pid"]),
            start_ticks=int(found["start_ticks"]),
            token=str(found["token"]),
            term=int(found["term"]),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None  # of another version, or cut off by a full disk: nobody can be reached through it
