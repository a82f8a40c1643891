"""The demo's own home, controller and nodes, and their end, however the demo ends."""

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from keepstep.cli import service
from keepstep.cli.client import Client, Json, ref
from keepstep.cli.demo.faults import lose_node
from keepstep.core.clock import SystemClock
from keepstep.core.errors import KeepstepError, TimedOut
from keepstep.core.home import Home, Running

NODES, SLOTS = 3, 4
_UP_WITHIN_S = 60.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    home: Home
    running: Running
    began_s: float  # by this process's monotonic clock

    @property
    def client(self) -> Client:
        return service.client(self.running)

    @classmethod
    @contextmanager
    def up(cls) -> Iterator["Stage"]:
        """A stage that is ready; nothing of it is left afterwards, on Ctrl-C and SIGTERM neither."""
        with _interruptible():
            began = SystemClock().monotonic()
            home = Home(path=Path(tempfile.mkdtemp(prefix="keepstep-demo-")))
            try:
                running = service.start(home, service.Options(nodes=NODES, slots=SLOTS)).running
                stage = cls(home=home, running=running, began_s=began)
                stage.await_nodes()
                yield stage
            finally:
                _clear(home)

    def await_nodes(self) -> None:
        clock = SystemClock()
        deadline = clock.monotonic() + _UP_WITHIN_S
        while True:
            nodes = self.client.get("/nodes")["nodes"]
            if sum(node["state"] == "ready" for node in nodes) >= NODES:
                return
            if clock.monotonic() > deadline:
                raise TimedOut(f"{len(nodes)} of {NODES} nodes are up after {_UP_WITHIN_S:.0f} s")
            time.sleep(_POLL_S)

    def node_folder(self, name: str) -> Path:
        return self.home.nodes / name

    def job(self, job: str) -> Json:
        return self.client.get(f"/jobs/{ref(job)}")

    def ranks(self, job: str) -> dict[int, Json]:
        return {rank["rank"]: rank for rank in self.client.get(f"/jobs/{ref(job)}/ranks")["ranks"]}

    def points(self, job: str) -> list[Json]:
        return self.client.pages(f"/jobs/{ref(job)}/metrics", "points", limit=100_000)

    def keep(self) -> None:
        """Stay up until Ctrl-C."""
        print("\nstays up until Ctrl-C; look at it from another terminal:")
        print(f"  KEEPSTEP_HOME={self.home.path} keepstep top")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            signal.pause()


def _clear(home: Home) -> None:
    """End all and take the folder away. A second Ctrl-C does not interrupt this."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with suppress(KeepstepError):
            service.stop(home, force=True, within_s=20.0)
        for folder in home.nodes.glob("*"):
            lose_node(folder)
        shutil.rmtree(home.path, ignore_errors=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
