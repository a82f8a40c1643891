"""A real controller with real agents and ranks, for tests that act as a user would.

Everything runs in a home of its own; `close` ends it and then looks for what was left behind: processes that
name the home or carry a marker of its jobs, and files in /dev/shm. A guard ends it where the run of the tests
is killed, or otherwise never comes to that.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keepstep.cli import service
from keepstep.cli.client import Client
from keepstep.cli.demo import faults
from keepstep.cli.jobs import ENDED
from keepstep.core.beacon import Phase
from keepstep.core.errors import KeepstepError, NotFound
from keepstep.core.home import Home, Running, running_controller
from keepstep.spec import load, to_dict

Json = dict[str, Any]
_POLL_S = 0.1  # more would take the processors from what is waited for
WITHIN_S = 240.0  # far more than anything takes, on a machine that is busy with other things


class Cluster:
    def __init__(self, home: Path, *, nodes: int, slots: int, **options: Any) -> None:
        self.home = Home(path=home)
        self.asked = nodes, slots, options
        self.options = service.Options(nodes=nodes, slots=slots, **options)
        self._shm = _shm_files()
        self._guard = guard(home)
        self.running = self.start()
        self.until(lambda: len(self.connected()) == nodes, f"{nodes} nodes to register")

    def start(self) -> Running:
        self.running = service.start(self.home, self.options).running
        return self.running

    @property
    def client(self) -> Client:
        return service.client(self.running)

    def connected(self) -> list[str]:
        return [node["name"] for node in self.client.get("/nodes")["nodes"] if node["connected"]]

    def until(self, condition: Callable[[], Any], what: str, *, within_s: float = WITHIN_S) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {within_s} s for {what}"
            time.sleep(_POLL_S)

    # ---------------------------------------------------------------- jobs

    def submit(self, text: str, *overrides: str, **body: Any) -> str:
        spec = load(text, "test.yaml", overrides, base_dir=self.home.path)
        return str(self.client.post("/jobs", {"spec": to_dict(spec), **body})["id"])

    def job(self, ref: str) -> Json:
        return self.client.get(f"/jobs/{ref}")

    def ranks(self, ref: str) -> dict[int, Json]:
        return {rank["rank"]: rank for rank in self.client.get(f"/jobs/{ref}/ranks")["ranks"]}

    def losses(self, ref: str) -> dict[int, float]:
        """Loss by step: of the newest attempt that completed the step."""
        points = self.client.pages(f"/jobs/{ref}/metrics", "points", limit=10_000)
        return {p["step"]: p["loss"] for p in sorted(points, key=lambda p: (p["step"], p["attempt"]))}

    def incidents(self, ref: str) -> list[Json]:
        """Oldest first."""
        found: list[Json] = self.client.get(f"/jobs/{ref}/incidents")["incidents"]
        return found[::-1]

    def wait(self, ref: str, condition: Callable[[Json], Any], *, within_s: float = WITHIN_S) -> Json:
        """Until the job fulfils a condition. Fails with what the job says instead."""
        deadline = time.monotonic() + within_s
        job: Json = {}
        while time.monotonic() < deadline:
            try:
                job = self.job(ref)
                if condition(job):
                    return job
            except KeepstepError as problem:
                if isinstance(problem, NotFound):
                    raise
            time.sleep(_POLL_S)
        raise AssertionError(
            f"after {within_s} s: {job.get('state')}: {job.get('reason')}\n{self.story(ref)}"
        )

    def story(self, ref: str) -> str:
        """The job's timeline, for whoever reads why a test failed."""
        events = self.client.pages("/events", "events", limit=200, job=ref)
        return "\n".join(f"  {event['at'] % 1000:7.2f} {event['kind']}: {event['text']}" for event in events)

    def wait_state(self, ref: str, *states: str, within_s: float = WITHIN_S) -> Json:
        return self.wait(ref, lambda job: job["state"] in states, within_s=within_s)

    def wait_step(self, ref: str, step: int, *, attempt: int = 1, within_s: float = WITHIN_S) -> Json:
        """Until a step was reported, by this attempt or a later one."""

        def reached(job: Json) -> bool:
            assert job["state"] not in {"failed", "cancelled"}, job["reason"]
            return bool(
                job["attempt"]
                and job["attempt"]["number"] >= attempt
                and job["attempt"]["first_step_at"]
                and (job["progress"]["step"] or 0) >= step
            )

        return self.wait(ref, reached, within_s=within_s)

    # ---------------------------------------------------------------- faults

    def kill_rank(self, ref: str, rank: int, how: signal.Signals = signal.SIGKILL) -> int:
        pid = int(self.ranks(ref)[rank]["pid"])
        os.kill(pid, how)
        return pid

    def kill_in_phase(
        self, ref: str, rank: int, phase: Phase, *, after_step: int, within_s: float = WITHIN_S
    ) -> int:
        """Kill -9 while the rank's beacon says that it is in `phase`; returns the step it had completed."""
        pid = int(self.ranks(ref)[rank]["pid"])
        return faults.kill_in_phase(pid, phase, after_step=after_step, within_s=within_s) - 1

    def lose_node(self, node: str) -> None:
        """As a power cut would."""
        faults.lose_node(self.home.nodes / node)

    def agent_pid(self, node: str) -> int:
        return int(self.client.get(f"/nodes/{node}")["pid"])

    def kill_controller(self) -> None:
        os.kill(self.running.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while running_controller(self.home) is not None:
            assert time.monotonic() < deadline
            time.sleep(_POLL_S)

    # ---------------------------------------------------------------- the end

    def settle(self, *, within_s: float = 30.0) -> bool:
        """End all jobs; whether all is then as it was at the start. Fails if they left something."""
        if running_controller(self.home) is None:
            return False
        deadline = time.monotonic() + within_s
        try:
            while alive := [job for job in self._jobs() if job["state"] not in ENDED]:
                for job in alive:
                    if job["state"] != "cancelling":
                        self.client.post(f"/jobs/{job['id']}/cancel", {"reason": "the test is over"})
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_S)
            nodes = self.client.get("/nodes")["nodes"]
        except KeepstepError:
            return False
        while left := self.left_of_attempts():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(_POLL_S)
        sound = [node for node in nodes if node["connected"] and not node["cordoned"]]
        return len(sound) == len(nodes) == self.options.nodes

    def _jobs(self) -> list[Json]:
        return self.client.pages("/jobs", "jobs", limit=1000)

    def close(self) -> None:
        if running_controller(self.home) is None:
            self.start()  # a test may have killed it: the next one ends what it left
        service.stop(self.home, force=True)
        self._guard.kill()
        self._guard.communicate()
        deadline = time.monotonic() + 20
        while left := self.left_behind():
            if time.monotonic() > deadline:
                for pid in left:
                    _kill(pid)
                raise AssertionError(f"left behind: {left}")
            time.sleep(0.1)
        files = _shm_files() - self._shm
        assert not files, f"left in /dev/shm: {files}"

    def left_behind(self) -> dict[int, str]:
        home = f"{self.home.path}/".encode()
        return {pid: shown(pid) for pid in _pids() if home in _cmdline(pid)} | self.left_of_attempts()

    def left_of_attempts(self) -> dict[int, str]:
        markers = {m.encode() for node in self._node_names() for m in self._markers(node)}
        return {pid: shown(pid) for pid in _pids() if _marker(pid) in markers}

    def _node_names(self) -> list[str]:
        return [path.name for path in self.home.nodes.glob("*")]

    def _markers(self, node: str) -> list[str]:
        jobs = (self.home.nodes / node / "jobs").glob("*/*")
        return [f"{path.parent.name}/{path.name}/{node}" for path in jobs]


def guard(home: Path) -> "subprocess.Popen[bytes]":
    """Takes the controller down, with the nodes and jobs that it has here, when this process is no more."""
    down = [sys.executable, "-m", "keepstep.cli.main", "down", "--force", "--yes"]
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; exec "$@"', "sh", *down], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "KEEPSTEP_HOME": str(home)},
    )  # fmt: skip


def _shm_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def _pids() -> list[int]:
    return [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and int(path.name) != os.getpid()
    ]


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def shown(pid: int) -> str:
    return _cmdline(pid).replace(b"\0", b" ").decode(errors="replace")[:200]


def _marker(pid: int) -> bytes:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
    found = next((v for v in environ.split(b"\0") if v.startswith(b"KEEPSTEP_ATTEMPT=")), b"")
    return found.removeprefix(b"KEEPSTEP_ATTEMPT=").strip()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
