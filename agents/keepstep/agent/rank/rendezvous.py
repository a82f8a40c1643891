"""The rendezvous store of one attempt: a TCPStore in a process of its own that outlives the ranks.

It listens on an IPv4 socket bound beforehand: a dual-stack one makes the server look up ::ffff:127.0.0.1
for each client, in its only thread, and that costs seconds. Each attempt has a fresh one, at a port
nobody chose. An interpreter without torch has no store: then a port that was free a moment ago is named,
and rank 0 may bind it (somebody else may be faster; the attempt then fails and is repeated with
another).
"""

import importlib
import importlib.util
import os
import signal
import socket
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from . import spawn
from .protocol import MARKER, LaunchFile


class Store:
    """The shim's hold on its store process."""

    def __init__(self, launch: LaunchFile) -> None:
        self._launch = launch
        self.pid: int | None = None
        self._held: int | None = None  # its pidfd
        self.ready: int | None = None  # readable when the store listens, or never will
        self.port: int | None = None
        self.listens = False
        self.note = ""

    def start(
        self, *, forked: bool, main: str, let_go: Callable[[], None],
        waiting: Callable[[int, int, str], tuple[int, int]] | None,
    ) -> None:  # fmt: skip
        """Bind, and start the process: forked from a loaded one, else by the job's interpreter.

        `waiting`: lets a process that was started ahead become it.
        """
        launch, host = self._launch, self._launch.bind_address
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((host, 0))
        self.port = listener.getsockname()[1]
        if not launch.interpreter:
            self.note = "no store: there is no interpreter to run it"
            listener.close()
            return
        listener.listen(2048)
        self.ready, told = os.pipe()
        os.set_blocking(self.ready, False)
        listening = listener.fileno()

        def child() -> None:
            let_go()
            listener.detach()
            spawn.descriptors(os.dup(2), (listening, told))
            if forked:
                serve(listening, told, host)
            words = (*launch.interpreter, main, "store", str(listening), str(told), host)
            spawn.execute(words, {**launch.env, MARKER: launch.marker})

        if waiting is not None:
            self.pid, self._held = waiting(listening, told, host)
        else:
            self.pid, self._held = spawn.fork(child)
        os.close(told)
        listener.close()

    def settle(self) -> None:
        """`ready` is readable: the store listens, or its process ended before it did."""
        assert self.ready is not None
        self.listens = os.read(self.ready, 16) == b"listens"
        if not self.listens:
            self.note = "no store: its process ended (see shim.log); rank 0 binds the port"
        os.close(self.ready)
        self.ready = None

    def ended(self) -> None:
        self.pid = None
        self.listens = False

    def end(self) -> None:
        if self._held is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._held, signal.SIGKILL)


def serve(listening: int, ready: int, host: str) -> None:
    """Be the store until killed. Ends at once where torch is missing."""
    store_of_torch = tcp_store()
    port = socket.socket(fileno=os.dup(listening)).getsockname()[1]
    store = store_of_torch(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening
    )  # no world size: whoever comes is served
    os.write(ready, b"listens")
    os.close(ready)
    while store is not None:
        signal.pause()


def tcp_store() -> Any:
    """The class TCPStore. ImportError where torch is missing.

    A store that starts cold takes it from torch's C library alone: the rest of `import torch` costs seconds
    of a processor, and this process needs nothing of it. Where that library cannot be had by itself (a build
    that must find CUDA's libraries first, a torch that is cut otherwise), torch is imported as usual.
    """
    if "torch" not in sys.modules:
        with suppress(ImportError, AttributeError):
            return _of_the_library()
        for name in _STANDS_IN:
            sys.modules.pop(name, None)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore


_STANDS_IN = ("torch.distributed", "torch")


def _of_the_library() -> Any:
    """The library looks its packages up when it is loaded, so empty ones stand in for them."""
    found = importlib.util.find_spec("torch")
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError("there is no torch")
    for name in reversed(_STANDS_IN):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torch"].__path__ = list(found.submodule_search_locations)
    importlib.import_module("torch._C")._c10d_init()
    return importlib.import_module("torch._C._distributed_c10d").TCPStore
