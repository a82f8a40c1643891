"""The sampling process as its agent holds it: started, listened to, watched, ended.

A process that hangs in the driver may be beyond killing until the driver lets it go: it is counted and left
behind, and what comes after it never waits for it.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import msgspec

from keepstep.agent.probes.gpu.page import Page
from keepstep.agent.probes.gpu.reading import HEADER, Frame, Order, decode

_READ_BYTES = 1 << 18
_FRAME_BYTES_MAX = 4 << 20


class SamplingProcess:
    """Needs a running event loop. Errors: OSError when it cannot be started."""

    def __init__(self, order: Order, take: Callable[[Frame], None]) -> None:
        self._take = take
        self.page = Page.made()
        self.frames = 0
        self.ended = asyncio.Event()  # its output is over
        self._stuck: dict[int, tuple[int, float]] = {}  # place -> (call's count, for how long by looks)
        self._data = b""
        self._process = start(order, self.page)
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        asyncio.get_running_loop().add_reader(self._output, self._readable)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def gone(self) -> bool:
        return self._process.poll() is not None

    @property
    def how(self) -> str:
        code = self._process.poll()
        if code is None:
            return "it closed its output"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def stuck_s(self, place: int, elapsed_s: float) -> tuple[float, int, str]:
        """For how long it has been in one and the same driver call: (seconds, GPU's index, call).

        Counted by looks that are `elapsed_s` apart: time in which this agent slept as well proves nothing.
        """
        count, gpu, call, _ = self.page.look(place)
        before, passed = self._stuck.get(place, (-1, 0.0))
        passed = passed + elapsed_s if call and count == before else 0.0
        self._stuck[place] = count, passed
        return passed, gpu, call

    def end(self) -> None:
        """Kill it, without waiting. `gone` says when it is."""
        loop = asyncio.get_running_loop()
        if not self.ended.is_set():
            loop.remove_reader(self._output)
            self.ended.set()
        with suppress(OSError):
            self._process.kill()
        assert self._process.stdout is not None
        if not self._process.stdout.closed:
            self._process.stdout.close()
            self.page.close()

    def _readable(self) -> None:
        try:
            data = os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._output)
            self.ended.set()
            return
        self._data += data
        while len(self._data) >= HEADER:
            size = int.from_bytes(self._data[:HEADER], "little")
            if size > _FRAME_BYTES_MAX:  # somebody else writes there, a library perhaps
                self.end()
                return
            if len(self._data) < HEADER + size:
                return
            frame, self._data = self._data[HEADER : HEADER + size], self._data[HEADER + size :]
            try:
                decoded = decode(frame)
            except msgspec.MsgspecError:
                self.end()
                return
            self.frames += 1
            self._take(decoded)


def start(order: Order, page: Page) -> "subprocess.Popen[bytes]":
    argument = msgspec.json.encode(order_of(order, page)).decode()
    return subprocess.Popen(
        [sys.executable, "-I", "-m", "keepstep.agent.probes.gpu", argument],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        pass_fds=(page.descriptor,), cwd="/", start_new_session=True,
    )  # fmt: skip


def order_of(order: Order, page: Page) -> Order:
    return msgspec.structs.replace(order, parent=os.getpid(), page=page.descriptor)
