"""`python -m keepstep.agent.probes.gpu ORDER`: the process that asks NVML, started and watched by `sampler`.

It writes frames to standard output until its agent ends (however that ends: the kernel kills it then). It
decides nothing: what hangs here is seen in the shared page, and this process is replaced.
"""

import os
import sys
import threading
import time
from collections.abc import Callable

import msgspec
import pynvml

from keepstep.agent.probes.gpu import catalogue, nvml
from keepstep.agent.probes.gpu.catalogue import PERIOD_S, Tier
from keepstep.agent.probes.gpu.page import EVENTS, NO_GPU, PASS, Page
from keepstep.agent.probes.gpu.reading import (
    Blind,
    Events,
    Frame,
    Opened,
    Order,
    Pass,
    Refused,
    encode,
    pci_address,
)  # fmt: skip
from keepstep.agent.rank import processes
from keepstep.core.clock import Clock, SystemClock

_SLICE_MS = 1000
_BURST = 4096  # events of a flood that are told together
_AGAIN_FIRST_S, _AGAIN_MAX_S = 1.0, 60.0
_LATE_S = 0.25  # tiers that are due so soon are taken along


class Output:
    """Frames of two threads, each whole."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._lock = descriptor, threading.Lock()

    def write(self, frame: Frame) -> None:
        data = memoryview(encode(frame))
        with self._lock:
            while data:
                data = data[os.write(self._descriptor, data) :]


class Passes:
    """The sampling thread: every second what is due of each GPU."""

    def __init__(self, gpus: list[nvml.Gpu], page: Page, output: Output, clock: Clock) -> None:
        self._gpus, self._page, self._output, self._clock = gpus, page, output, clock
        self.due = dict.fromkeys(Tier, 0.0)
        self._hurry = threading.Event()

    def hurry(self) -> None:
        """After an XID that may have changed rows or the action that is asked for."""
        self.due[Tier.ROWS] = self.due[Tier.HEAT] = 0.0
        self._hurry.set()

    def run(self, passes: int) -> None:
        count = 0
        due = self._clock.monotonic()
        while passes == 0 or count < passes:
            self._output.write(self.once())
            count += 1
            due = max(due + PERIOD_S[Tier.FAST], self._clock.monotonic())
            self._hurry.wait(max(0.0, due - self._clock.monotonic()))
            if self._hurry.is_set():
                self._hurry.clear()
                due = self._clock.monotonic()

    def once(self) -> Pass:
        began, spent_ns = self._clock.monotonic(), time.thread_time_ns()
        tiers = [tier for tier, due in self.due.items() if due <= began + _LATE_S]
        for tier in tiers:
            self.due[tier] = began + PERIOD_S[tier]
        readings = [gpu.sample(tiers) for gpu in self._gpus]
        self._page.leave(PASS)
        return Pass(readings, cpu_ms=(time.thread_time_ns() - spent_ns) / 1e6)


class EventSet:
    """The thread that waits for XIDs."""

    def __init__(
        self, gpus: list[nvml.Gpu], page: Page, output: Output, clock: Clock, hurry: Callable[[], None]
    ) -> None:
        self._gpus, self._page, self._output, self._clock, self._hurry = gpus, page, output, clock, hurry
        self._addresses = {gpu.reading.gpu.uuid: gpu.reading.gpu.pci for gpu in gpus}
        self._rest = threading.Event()

    def run(self) -> None:
        pause_s, said = _AGAIN_FIRST_S, ""
        while True:
            try:
                listening = self._listening()
                if said:
                    said = ""
                    self._output.write(Blind(""))
                pause_s = _AGAIN_FIRST_S
                self._wait(listening)
            except pynvml.NVMLError as error:
                if error.value in {catalogue.FUNCTION_NOT_FOUND, catalogue.NOT_SUPPORTED}:
                    self._output.write(Blind("this driver has no events"))
                    return
                why = f"NVML's event set cannot be waited for: error {error.value}"
                if why != said:
                    said = why
                    self._output.write(Blind(why))
            self._rest.wait(pause_s)
            pause_s = min(2 * pause_s, _AGAIN_MAX_S)

    def _listening(self) -> object:
        """A set in which every GPU is that can be. Errors: pynvml.NVMLError."""
        events = pynvml.nvmlEventSetCreate()
        for gpu in self._gpus:
            index = gpu.reading.gpu.index
            self._page.enter(EVENTS, index, "nvmlDeviceRegisterEvents", self._clock.monotonic())
            try:
                kinds = pynvml.nvmlDeviceGetSupportedEventTypes(gpu.handle)
                wanted = kinds & (catalogue.XID_EVENT | catalogue.RECOVERY_EVENT)
                pynvml.nvmlDeviceRegisterEvents(gpu.handle, wanted, events)
            except pynvml.NVMLError as error:
                if error.value == catalogue.FUNCTION_NOT_FOUND:
                    raise
        return events

    def _wait(self, events: object) -> None:
        while True:
            seen = Events([], {})
            xids: dict[tuple[str, int], int] = {}
            for turn in range(_BURST):
                self._page.enter(EVENTS, NO_GPU, "nvmlEventSetWait", self._clock.monotonic())
                try:
                    event = pynvml.nvmlEventSetWait(events, 0 if turn else _SLICE_MS)
                except pynvml.NVMLError as error:
                    if error.value == catalogue.TIMEOUT:
                        break
                    raise
                self._take(event, xids, seen)
            seen.xids = [(pci, code, count) for (pci, code), count in xids.items()]
            if seen.xids or seen.actions:
                self._output.write(seen)
                if seen.actions or any(code in catalogue.ROW_XIDS or code == 154 for _, code, _ in seen.xids):
                    self._hurry()

    def _take(
        self, event: "pynvml.c_nvmlEventData_t", xids: dict[tuple[str, int], int], seen: Events
    ) -> None:
        """Handles differ between calls: GPUs are told apart by UUID."""
        uuid = nvml.text(pynvml.nvmlDeviceGetUUID(event.device))
        if event.eventType & catalogue.RECOVERY_EVENT:
            seen.actions[uuid] = int(event.eventData)
        elif event.eventType & catalogue.XID_EVENT:
            pci = self._addresses.get(uuid) or pci_address(
                nvml.text(pynvml.nvmlDeviceGetPciInfo(event.device).busId)
            )
            key = pci, int(event.eventData)
            xids[key] = xids.get(key, 0) + 1


def main(argument: str) -> int:
    order = msgspec.json.decode(argument.encode(), type=Order)
    processes.die_with(order.parent)
    page, output, clock = Page(order.page), Output(1), SystemClock()
    try:
        driver, version = nvml.start(page, clock)
        gpus, errors = nvml.opened(order, page, clock)
    except pynvml.NVMLError as error:
        output.write(Refused(error=error.value, text=str(error)))
        return 0
    output.write(Opened(driver, version, [gpu.reading.gpu for gpu in gpus], errors))
    if order.passes < 0:
        return 0
    passes = Passes(gpus, page, output, clock)
    if order.events:
        waiting = EventSet(gpus, page, output, clock, passes.hurry)
        threading.Thread(target=waiting.run, daemon=True).start()
    passes.run(order.passes)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # not by way of NVML's own cleaning up, which may hang
