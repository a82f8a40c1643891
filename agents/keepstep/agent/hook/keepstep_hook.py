"""What a rank tells about itself without a changed line.

This folder is the last entry of the ranks' PYTHONPATH, and PyTorch calls its entry point (`torch.backends`)
at the end of `import torch`. In the rank itself, and in no other process, that

- writes the rank's beacon: batches of data loaders, forward of a DDP module, backward, optimizer steps;
- opens PyTorch's control server on a Unix socket of the attempt, beside the first process group: it answers
  from threads of its own, also while the interpreter is stuck;
- lets init_process_group work as often as a script likes, by a prefix of its own in the store from the
  second time on.

A script that uses keepstep.session says more, and from then on the session alone writes; what is seen without
it is in keepstep.agent.hook.keepstep_marks.

It never makes a script fail: what goes wrong here is told once on standard error, and the marks end. Once
loaded it takes its folder off sys.path and PYTHONPATH again, so that a script's children do not meet it. A
program that the rank executes in its own place afterwards is therefore not seen.

Flat modules, standard library only, for every Python that has a PyTorch; the beacon's code is loaded from
where KEEPSTEP_BEACON_CODE says, since keepstep need not be installed beside the script.
"""

import atexit
import ctypes
import functools
import importlib.util
import inspect
import json
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

VERSION = 1
_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - compared with entries of sys.path
_MARKS = "_keepstep_marks", f"{_HERE}/keepstep_marks.py"


class Control:
    """PyTorch's control server, and beside it what it does not tell: which ranks a group has.

    It is opened with the first process group, when there are threads anyway.
    """

    def __init__(self, extension: Any, path: str) -> None:
        self._make, self._path = getattr(extension, "_WorkerServer", None), path
        self._pid = os.getpid()
        self._noted = False

    def open(self) -> None:
        make, self._make = self._make, None
        if make is None or not self._path or os.getpid() != self._pid:
            return
        folder, name = os.path.split(self._path)
        try:
            with suppress(FileNotFoundError):
                os.unlink(self._path)  # noqa: PTH108
            held = os.open(folder, os.O_PATH | os.O_DIRECTORY)
            try:
                with _unsaid(b"WorkerServer.cpp"):
                    server = make(
                        f"/proc/self/fd/{held}/{name}"
                    )  # the name of a socket has 107 bytes at most
            finally:
                os.close(held)
            # Its destructor joins threads, which a forked child of the script does not have: it is never run.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(server))
            atexit.register(self._close, server)
        except Exception as error:  # noqa: BLE001 - outermost: as above
            _say(f"the control server is not there: {error!r}")

    def note(self, group: Mapping[str, Any]) -> None:
        """Add a line for a new group; of ranks in a row only the first and the last are written."""
        ranks = list(group["global_ranks_in_group"]) or list(range(group["group_size"]))
        whole = len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1))
        line = {
            "name": str(group["group_name"]),
            "ranks": [ranks[0], ranks[-1]] if whole else ranks,
            "whole": whole,
        }
        with open(self._path + ".groups", "a" if self._noted else "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(json.dumps(line) + "\n")
        self._noted = True

    def _close(self, server: Any) -> None:
        """A request that came now would meet an interpreter that has ended."""
        if os.getpid() == self._pid:
            with suppress(Exception), _unsaid(b"WorkerServer.cpp"):
                server.shutdown()
            with suppress(OSError):
                os.unlink(self._path)  # noqa: PTH108


def _guard_groups(distributed: Any, rendezvous: Any, extension: Any, control: Control) -> None:
    """See every process group come: its store, and who is in it."""
    create, group = rendezvous._create_c10d_store, distributed._new_process_group_helper
    times: dict[Any, int] = {}
    signature = inspect.signature(group)

    @functools.wraps(create)
    def create_store(*args: Any, **kwargs: Any) -> Any:
        control.open()
        store = create(*args, **kwargs)
        times[args[:2]] = number = times.get(args[:2], 0) + 1  # by host and port
        return store if number == 1 else extension.PrefixStore(f"keepstep/{number}", store)

    @functools.wraps(group)
    def new_group(*args: Any, **kwargs: Any) -> Any:
        control.open()
        with suppress(Exception):  # only for the names in a report
            control.note(signature.bind(*args, **kwargs).arguments)
        return group(*args, **kwargs)

    rendezvous._create_c10d_store, distributed._new_process_group_helper = create_store, new_group


_present: dict[str, Any] = {}  # what this process has begun, and said


def start() -> None:
    """In the rank: begin. Anywhere else, and a second time: nothing."""
    own = os.environ.get("KEEPSTEP_RANK_PID") == str(os.getpid())
    torch: Any = sys.modules.get("torch")
    if not own or torch is None or "version" in _present or os.environ.get("KEEPSTEP_HOOK") == "0":
        return
    _present["version"] = VERSION
    for part in (_unlist, _watch_groups, _mark):
        try:
            part(torch)
        except Exception as error:  # noqa: BLE001 - outermost: a script must not fail for what we do
            _say(f"this PyTorch is not known, and not all of its progress is seen: {error!r}")


def _watch_groups(torch: Any) -> None:
    distributed = sys.modules.get("torch.distributed.distributed_c10d")
    rendezvous = sys.modules.get("torch.distributed.rendezvous")
    if distributed is not None and rendezvous is not None:
        extension = torch._C._distributed_c10d
        _guard_groups(distributed, rendezvous, extension, Control(extension, os.environ["KEEPSTEP_CONTROL"]))


def _mark(torch: Any) -> None:
    beacon, page = _code("_keepstep_beacon", os.environ["KEEPSTEP_BEACON_CODE"]), _page()
    if page is not None and beacon.writer_of(page) != os.getpid():  # else the script marks by itself
        _present["marks"] = _code(*_MARKS).attach(torch, beacon, page, _say)


def autoload() -> None:
    """PyTorch's call. In a standby server it is too early: there code is loaded, and the rank resumes."""
    with suppress(Exception):
        _code("_keepstep_beacon", os.environ["KEEPSTEP_BEACON_CODE"])
        _code(*_MARKS)
    start()


__keepstep_resume__ = start


def hand_over() -> None:
    """The script marks its own progress from now on."""
    if (marks := _present.get("marks")) is not None:
        marks.end()


def _unlist(_: Any) -> None:
    """The script's children, and what it looks for from now on, have no business here."""
    sys.path[:] = [entry for entry in sys.path if entry != _HERE]
    left = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", _HERE)]
    os.environ["PYTHONPATH"] = os.pathsep.join(left)
    if not left:
        del os.environ["PYTHONPATH"]


def _code(name: str, path: str) -> Any:
    """A module by its path, under a name of ours."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[name] = module
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    return sys.modules[name]


def _page() -> mmap.mmap | None:
    """The rank's beacon. A script may have closed all descriptors and opened a file under its number."""
    descriptor = int(os.environ["KEEPSTEP_BEACON_FD"])
    with suppress(OSError):
        if "keepstep-beacon" in os.readlink(f"/proc/self/fd/{descriptor}"):  # noqa: PTH115
            return mmap.mmap(descriptor, 4096)
    return None


@contextmanager
def _unsaid(words: bytes) -> Iterator[None]:
    """Keep lines with these words out of standard error. What else is said meanwhile is said afterwards."""
    try:
        before, kept = os.dup(2), os.memfd_create("keepstep-said")
    except OSError:  # the script has none
        yield
        return
    os.dup2(kept, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.lseek(kept, 0, os.SEEK_SET)
        for line in os.read(kept, 1 << 20).splitlines(keepends=True):
            if words not in line:
                os.write(2, line)
        os.close(before)
        os.close(kept)


def _say(what: str) -> None:
    """Once: several lines of ours would only hide the script's."""
    if "said" not in _present:
        _present["said"] = what
        with suppress(OSError):
            os.write(2, f"keepstep: {what}\n".encode())
