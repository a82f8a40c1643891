"""Real carriers with real memory files, for tests that play rank and agent."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keepstep.core.snapshots import Stamp
from keepstep.session.carrier import Carrier
from keepstep.session.slots import Slots

WITHIN_S = 60.0
DESCRIPTION, PAYLOAD = 256, 3 << 20


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WITHIN_S} s for {what}"
        time.sleep(0.01)


class Node:
    """One node's carrier, asked as its agent would ask."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory / name / "carrier" / "job", name
        self.directory.mkdir(parents=True)
        self._opened: list[Slots] = []
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-I", "-m", "keepstep.agent.carrier", str(self.directory), "127.0.0.1"]
        subprocess.run(command, check=True, timeout=WITHIN_S)
        until(self.answers, f"the carrier of {self.name}")

    def answers(self) -> bool:
        try:
            self.ask(do="hello")
        except Exception:  # noqa: BLE001 - whatever it is, it does not answer
            return False
        return True

    def ask(self, **request: Any) -> dict[str, Any]:
        carrier = Carrier(self.directory)
        try:
            return carrier.ask(**request)[0]
        finally:
            carrier.close()

    @property
    def pid(self) -> int:
        return int(json.loads((self.directory / "carrier.json").read_bytes())["pid"])

    @property
    def port(self) -> int:
        return int(self.ask(do="hello")["address"][1])

    def held(self) -> set[tuple[int, int, int, bool]]:
        """rank, attempt, step, own"""
        return {(rank, a, s, own) for rank, _, a, s, own in self.ask(do="held")["held"]}

    def meet(self, *others: "Node", buddy: str = "", key: str = "s", bytes_max: int | None = None) -> None:
        addresses = {other.name: ["127.0.0.1", other.port] for other in others}
        self.ask(do="peers", addresses=addresses, buddy=buddy, secret=key, bytes_max=bytes_max)

    def prepare(
        self, attempt: int, parents: dict[int, tuple[int, int]], ranks: list[int], *, world: int,
        memory: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        lineage = [[n, *parents.get(n, (0, 0))] for n in range(1, attempt + 1)]
        self.ask(do="prepare", attempt=attempt, world=world, ranks=ranks, lineage=lineage, memory=memory)

    def slots(self, rank: int, *, world: int, attempt: int) -> Slots:
        found = Slots.open(
            {"KEEPSTEP_CARRIER": str(self.directory)}, rank=rank, world=world, attempt=attempt,
            description_max=DESCRIPTION, payload_max=PAYLOAD,
        )  # fmt: skip
        assert found is not None
        self._opened.append(found)
        return found

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        until(lambda: not self.answers(), "its death")

    def end(self) -> None:
        for slots in self._opened:
            slots.close()
        self._opened.clear()
        if self.answers():
            self.ask(do="end")
            until(lambda: not self.answers(), "its end")


@contextmanager
def nodes(directory: Path, *names: str) -> Iterator[list[Node]]:
    """Carriers that know each other; each is the next one's buddy."""
    found = [Node(directory, name) for name in names]
    try:
        for k, node in enumerate(found):
            node.meet(*found, buddy=found[(k + 1) % len(found)].name if len(found) > 1 else "")
        yield found
    finally:
        for node in found:
            node.end()


def content(rank: int, step: int) -> bytes:
    return bytes([rank + 1, step & 0xFF, 7]) * (PAYLOAD // 3)


def take(slots: Slots, step: int) -> bool:
    """A snapshot, as a rank makes it. False: it was skipped."""
    number = slots.begin(step)
    if number is None:
        return False
    slots.payload(number)[:] = content(slots.shape.rank, step)
    slots.finish(json.dumps({"step": step}).encode(), PAYLOAD)
    return True


def agree(*ranks: Slots) -> None:
    """The reduction of one step."""
    said = [slots.says for slots in ranks]
    for slots in ranks:
        slots.heard((min(s[0] for s in said), min(s[1] for s in said), min(s[2] for s in said)))


def protect(*ranks: Slots, step: int) -> None:
    """Until every rank has a step twice; what is older is agreed on first."""

    def protected() -> bool:
        if all(slots.says[0] >= step for slots in ranks):
            return True
        agree(*ranks)
        return False

    until(protected, f"step {step} of ranks {[slots.shape.rank for slots in ranks]}")


def restore(slots: Slots, rank: int, *, world: int, at: tuple[int, int]) -> bytes:
    return bytes(slots.load([rank], world, Stamp(*at))[0].payload)
