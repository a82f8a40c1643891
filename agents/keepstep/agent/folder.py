"""The agent's own folder, and the one agent that holds it.

agent.lock                     held (flock) by the agent of role run; names its pid. `watch` has its own
credential                     0600: what a join token was exchanged for
term.json                      the newest controller term seen: older controllers are refused
events/                        the spool (see spool)
bundles/<sha256>.tar           shipped work folders, as fetched
standby/<key>/                 one standby server each (see standby)
learnt/<digest>.json           what runs of a script were seen to import (see learnt)
carrier/<job>/                 one carrier of snapshots each (see carriers)
probes/gpus.json               the GPUs that this node had; `watch` has a folder of its own (probes-watch)
probes/faults.msgpack          what was counted since boot (see probes.xid.watcher)
jobs/<job>/workdir-<sha>/      a shipped work folder, unpacked: shared by the attempts of its job
jobs/<job>/removed.json        the newest attempt whose folder was cleaned away: it may not start again
jobs/<job>/<attempt>/          one attempt: made before anything is started, so it starts at most once
    order.msgpack              the Launch, with the slots it was given; before anything else
    outcome.json               how it ended on this node, unless that is what result.json says
    forgotten                  the controller has recorded the end: not reported any more
    launch.json shim.sock shim.json result.json rank-R.log error-R.json job.json
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from keepstep.core import durable
from keepstep.core.errors import InputError, Refused

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Folder:
    path: Path

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    @property
    def events(self) -> Path:
        return self.path / "events"

    @property
    def bundles(self) -> Path:
        return self.path / "bundles"

    @property
    def standbys(self) -> Path:
        return self.path / "standby"

    @property
    def carriers(self) -> Path:
        return self.path / "carrier"

    def probes(self, role: str) -> Path:
        """Two agents of one folder see the same node, each for itself."""
        return self.path / ("probes-watch" if role == "watch" else "probes")

    @property
    def credential(self) -> Path:
        return self.path / "credential"

    def make(self) -> None:
        for part in (self.path, self.jobs, self.events, self.bundles, self.standbys, self.carriers):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)

    def job(self, job: str) -> Path:
        """Errors: InputError for a name that could lead out of the folder."""
        if _NAME.fullmatch(job) is None:
            raise InputError(f"{job!r} cannot be a job's name")
        return self.jobs / job

    def attempt(self, job: str, attempt: int) -> Path:
        return self.job(job) / str(attempt)

    def attempts(self) -> Iterator[tuple[str, int, Path]]:
        """Every launch folder there is, jobs by name, attempts by number."""
        for job in sorted(entry for entry in self.jobs.iterdir() if entry.is_dir()):
            for number in sorted(int(entry.name) for entry in job.iterdir() if entry.name.isdecimal()):
                yield job.name, number, job / str(number)

    # -- the newest term

    def read_term(self) -> int:
        try:
            return int(json.loads((self.path / "term.json").read_bytes())["term"])
        except FileNotFoundError:
            return 0

    def write_term(self, term: int) -> None:
        durable.write_json(self.path / "term.json", {"term": term})

    # -- attempts that were cleaned away

    def removed(self, job: str) -> int:
        """No attempt up to this number may ever start here (again); 0 if all are still on disk."""
        try:
            return int(json.loads((self.job(job) / "removed.json").read_bytes())["attempt"])
        except FileNotFoundError:
            return 0

    def write_removed(self, job: str, attempt: int) -> None:
        durable.write_json(self.job(job) / "removed.json", {"attempt": attempt})


class Lock:
    """Held while this process lives; the kernel lets go of it even after a SIGKILL."""

    def __init__(self, folder: Path, role: str) -> None:
        parts = {"run": ["agent"], "watch": ["agent-watch"]}.get(role, ["agent", "agent-watch"])
        self._held: list[int] = []
        try:
            for part in parts:
                self._held.append(_lock(folder / f"{part}.lock"))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)
        self._held = []


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "?"
        os.close(descriptor)
        raise Refused(
            f"another agent (process {holder}) works in this folder",
            where=str(path.parent),
            next="Give each agent a --dir of its own, or end that process first.",
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
