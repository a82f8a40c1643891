"""Which GPUs this node has: the one place that knows whether there is an NVIDIA driver.

Whether there may be one is seen without loading anything; whether there is one, and with which GPUs, NVML
says in a process of its own, which may hang. What was found is kept: a GPU that is lost, or hangs, before
this agent was started is still known, and fewer than before are noticed.
"""

import logging
import os
import selectors
from collections.abc import Mapping
from pathlib import Path

import msgspec

from keepstep.agent.probes.gpu.catalogue import LIBRARY_NOT_FOUND, TIMEOUT
from keepstep.agent.probes.gpu.page import NO_GPU, PASS, Page
from keepstep.agent.probes.gpu.process import start
from keepstep.agent.probes.gpu.reading import HEADER, Identity, Opened, Order, Refused, decode
from keepstep.core.clock import Clock

_log = logging.getLogger("keepstep.agent")
OPEN_S = 60.0  # NVML loads the state of every GPU where no persistence daemon keeps it
_KNOWN_S = 5.0  # of a node whose GPUs are known from before: its agent is not kept from its ranks for longer
_TICK_S = 0.25
_SIGNS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")
_LIBRARY = "libnvidia-ml.so.1"


class Kept(msgspec.Struct, frozen=True):
    """gpus.json: the most GPUs that this node ever had."""

    gpus: tuple[Identity, ...] = ()


class Inventory:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.kept = msgspec.json.decode(path.read_bytes(), type=Kept)
        except (OSError, msgspec.MsgspecError):  # the first time, or of another version
            self.kept = Kept()

    @property
    def gpus(self) -> tuple[Identity, ...]:
        return self.kept.gpus

    def see(self, gpus: list[Identity]) -> None:
        """As many as ever, or more: these are the node's GPUs now (one may have been replaced)."""
        if len(gpus) >= len(self.kept.gpus) and tuple(gpus) != self.kept.gpus:
            self.kept = Kept(tuple(gpus))
            beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                beside.write_bytes(msgspec.json.encode(self.kept))
                beside.rename(self._path)
            except OSError as error:
                _log.warning("%s cannot be written: %s", self._path, error)


def may_be_here(environ: Mapping[str, str]) -> bool:
    """Whether it is worth while to ask NVML."""
    folders = [Path(folder) for folder in environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return any(Path(sign).exists() for sign in _SIGNS) or any((f / _LIBRARY).exists() for f in folders)


def find(inventory: Inventory, clock: Clock, environ: Mapping[str, str], *, call_s: float) -> tuple[str, ...]:
    """UUIDs by index: the node's GPUs as NVML tells them, once, at the start. Blocks for that.

    Empty where there is no driver. Where NVML hangs or fails on a node that had GPUs: those. `call_s`: a call
    about one GPU that takes longer hangs, and the others are listed without it.
    """
    if not may_be_here(environ):
        _log.info("no NVIDIA driver here: slots are processes on the CPU")
        return ()
    told = _listed(clock, _KNOWN_S if inventory.gpus else OPEN_S, call_s)
    if isinstance(told, Opened):
        inventory.see(told.gpus)
        _log.info("NVIDIA driver %s, NVML %s: %d GPUs", told.driver, told.nvml, len(told.gpus))
        present = {gpu.index: gpu for gpu in told.gpus}
        known = {gpu.index: gpu for gpu in inventory.gpus if gpu.index in told.errors}
        return tuple(gpu.uuid for _, gpu in sorted({**known, **present}.items()))
    why = told.text if isinstance(told, Refused) else told
    if inventory.gpus and not (isinstance(told, Refused) and told.error == LIBRARY_NOT_FOUND):
        _log.warning("NVML cannot be used (%s): this node had %d GPUs", why, len(inventory.gpus))
        return tuple(gpu.uuid for gpu in inventory.gpus)
    _log.info("NVML cannot be used here (%s): slots are processes on the CPU", why)
    return ()


def _listed(clock: Clock, within_s: float, call_s: float) -> Opened | Refused | str:
    """What NVML has, without the GPUs that hang; why it cannot be told."""
    hang: dict[int, int] = {}
    while True:
        told = _ask(clock, within_s, call_s, tuple(map(str, hang)))
        if not isinstance(told, int):
            break
        _log.warning("GPU %d hangs while it is listed; it is left out", told)
        hang[told] = TIMEOUT
    if isinstance(told, Opened):
        told.errors = {**told.errors, **hang}
    return told


def _ask(
    clock: Clock, within_s: float, call_s: float, left_out: tuple[str, ...]
) -> Opened | Refused | str | int:
    """The first frame of a process that only lists; why there is none; or the index of a GPU that hangs."""
    page = Page.made()
    process = start(Order(parent=0, page=0, passes=-1, events=False, left_out=left_out), page)
    assert process.stdout is not None
    try:
        data, deadline = b"", clock.monotonic() + within_s
        call, stuck_s = page.look(PASS), 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(data) < HEADER or len(data) < HEADER + int.from_bytes(data[:HEADER], "little"):
                if selector.select(_TICK_S):
                    more = os.read(process.stdout.fileno(), 1 << 16)
                    if not more:
                        return "its process has died"
                    data += more
                    continue
                before, call = call, page.look(PASS)
                stuck_s = stuck_s + _TICK_S if call == before else 0.0
                if call[2] and call[1] != NO_GPU and stuck_s > call_s:
                    return call[1]
                if clock.monotonic() > deadline:
                    return f"{call[2] or 'its process'} does not come back"
        frame = decode(data[HEADER : HEADER + int.from_bytes(data[:HEADER], "little")])
        return frame if isinstance(frame, Opened | Refused) else "its process talks nonsense"
    except msgspec.MsgspecError:
        return "its process talks nonsense"
    finally:
        process.kill()
        process.stdout.close()
        if page.look(PASS)[2] == "":  # whoever hangs in the driver may be beyond killing
            process.wait()
        page.close()
