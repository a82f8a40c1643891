"""One `keepstep run`, from the agent's start to the script's exit code.

The main thread pumps output and takes signals; a second thread follows the job's events. The first Ctrl-C (or
SIGTERM, SIGHUP) cancels the job, which gives the ranks their stop signal and their grace; a second one kills
them.
"""

import contextlib
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

from keepstep.cli import attached, events
from keepstep.cli.client import Client, Json, ref
from keepstep.cli.tails import Tails
from keepstep.core.clock import SystemClock
from keepstep.core.errors import KeepstepError, Refused, Unreachable
from keepstep.core.home import find_home
from keepstep.core.job import JobSpec
from keepstep.core.states import JOB

_PUMP_S = 0.03
_LOOK_S = 2.0  # at the job, beside its events
_FINAL = frozenset(str(state) for state in JOB.final)
_TOLD = {"detected", "requeued", "failed"}  # kinds of events worth a line; others when recovering
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True, kw_only=True)
class Session:
    client: Client
    spec: JobSpec
    asked: list[int] = field(default_factory=list)  # signals that came, oldest first
    _heard: "queue.SimpleQueue[Json]" = field(default_factory=queue.SimpleQueue)

    @classmethod
    def of(cls, client: Client, spec: JobSpec) -> "Session":
        return cls(client=client, spec=spec)

    def run(self) -> int:
        """Run the job to its end; the exit code for the shell."""
        with self._signals():
            agent = attached.start(find_home().make(), self.client, slots=self.spec.resources.ranks)
            try:
                return self._attended(agent)
            finally:
                agent.end()

    def _attended(self, agent: attached.AttachedAgent) -> int:
        from keepstep.spec import to_dict

        body = {"spec": to_dict(self.spec), "source": {"file": "keepstep run"}, "attached": agent.node}
        job = self.client.post("/jobs", body)
        ranks = self.spec.resources.ranks
        tails = Tails(agent.jobs / job["id"], ranks=ranks, write=_write)
        threading.Thread(target=self._follow, args=(job["id"],), daemon=True).start()
        ended = self._until_ended(agent, job["id"], tails)
        tails.drain()
        return self._exit_code(ended)

    def _until_ended(self, agent: attached.AttachedAgent, job: str, tails: Tails) -> Json:
        """Pump until the job is over, or its agent is: then nothing of it can run any more."""
        clock = SystemClock()
        handled, look_at = 0, clock.monotonic() + _LOOK_S
        while True:
            moved = tails.pump()
            final = self._tell()
            if len(self.asked) > handled:
                handled = len(self.asked)
                self._stop(agent, job, times=handled)
            if final or clock.monotonic() > look_at or not agent.alive:
                look_at = clock.monotonic() + _LOOK_S
                found = self._look(job)
                if found is not None and found["state"] in _FINAL:
                    return found
                if not agent.alive:
                    return {"id": job, "state": "failed", "exit_code": None, "reason": "its agent ended"}
            if not moved:
                time.sleep(_PUMP_S)

    def _look(self, job: str) -> Json | None:
        try:
            return self.client.get(f"/jobs/{ref(job)}")
        except Unreachable:
            return None  # the ranks go on; the agent finds the controller when it is back

    def _stop(self, agent: attached.AttachedAgent, job: str, *, times: int) -> None:
        if times > 1:
            print("keepstep: killing the ranks", file=sys.stderr)
            agent.kill_ranks()
            return
        name = signal.Signals(self.asked[0]).name
        print(f"keepstep: {name}: the ranks are told to end; once more kills them", file=sys.stderr)
        try:
            self.client.post(f"/jobs/{ref(job)}/cancel", {"reason": f"{name} at the terminal"})
        except Refused:
            return  # over already
        except KeepstepError:
            agent.kill_ranks()  # nobody else passes it on

    def _tell(self) -> bool:
        """Print what happened to the job beside its output; whether it may be over."""
        over = False
        while True:
            try:
                event = self._heard.get_nowait()
            except queue.Empty:
                return over
            over = over or event["kind"] in _FINAL
            again = event["kind"] in {"placed", "stepped"} and (event.get("attempt") or 1) > 1
            if event["kind"] in _TOLD or again:
                print(f"keepstep: {event['kind']}: {event.get('text') or ''}", file=sys.stderr)

    def _follow(self, job: str) -> None:
        """The second thread: events into the queue. Ends with the process."""
        with contextlib.suppress(KeepstepError):
            for event in events.follow(self.client, after=0, job=job):
                self._heard.put(event)

    def _exit_code(self, job: Json) -> int:
        if self.asked:
            return 128 + self.asked[0]
        code: int | None = job.get("exit_code")
        if job["state"] == "succeeded":
            return 0
        if code is None:
            print(f"keepstep: {job['id']} {job['state']}: {job.get('reason') or ''}", file=sys.stderr)
            return 1
        return code if code >= 0 else 128 - code

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Collect signals instead of ending by them."""

        def take(number: int, frame: FrameType | None) -> None:
            self.asked.append(number)

        before = {number: signal.signal(number, take) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
