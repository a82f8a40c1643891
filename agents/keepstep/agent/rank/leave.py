"""How a process that became a script ends: what the interpreter does at its end, in its order.

Threads are joined, atexit runs, the streams are flushed, the script's own modules are torn down (so that
its open files are written and its finalizers run). What was preloaded is not torn down: that takes a
second of CPU per rank, copies every page that was shared, and has nothing of the script in it. So the
end is `_exit`, not `exit`.
"""

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType, TracebackType
from typing import NoReturn

_UNFLUSHED = 120  # the interpreter's exit code when standard output cannot be flushed


def run(
    body: Callable[[], None],
    *,
    ours: Callable[[str], bool],
    preloaded: frozenset[str],
    at_end: Callable[[], None],
) -> NoReturn:
    """Run a script's body and end this process as it ends. `ours`: files whose frames are not shown.

    `at_end` is called when the script is over, before anything of it is torn down.
    """
    code, interrupted = 0, False
    try:
        body()
    except SystemExit as leaving:
        code = _code_of(leaving)
    except BaseException as error:  # noqa: BLE001 - the outermost boundary of the script
        interrupted = isinstance(error, KeyboardInterrupt)
        code = _show(error, ours)
    _guarded(threading._shutdown)  # type: ignore[attr-defined]
    _guarded(atexit._run_exitfuncs)
    _guarded(at_end)
    if not flush(told=True):
        code, interrupted = _UNFLUSHED, False
    _tear_down(preloaded)
    flush()
    ctypes.CDLL(None).fflush(None)
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _code_of(leaving: SystemExit) -> int:
    match leaving.code:
        case None:
            return 0
        case int(code):
            return code & 0xFF if -(1 << 63) <= code < 1 << 63 else 0xFF
        case words:
            with suppress(BaseException):
                sys.stderr.write(f"{words}\n")
            return 1


def _show(error: BaseException, ours: Callable[[str], bool]) -> int:
    """Let sys.excepthook show an uncaught error without our frames; the exit code."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    error.__traceback__ = trace
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
    if sys.version_info >= (3, 12):
        sys.last_exc = error
    try:
        sys.excepthook(type(error), error, trace)
    except SystemExit as leaving:
        return _code_of(leaving)
    except BaseException as second:  # noqa: BLE001 - outermost: a script's own hook failed
        inner = second.__traceback__.tb_next if second.__traceback__ else None
        second.__context__ = None
        with suppress(BaseException):
            sys.stderr.write("Error in sys.excepthook:\n")
            traceback.print_exception(type(second), second, inner)
            sys.stderr.write("\nOriginal exception was:\n")
            traceback.print_exception(type(error), error, trace)
    return 1


def _guarded(step: Callable[[], object]) -> None:
    try:
        step()
    except BaseException:  # noqa: BLE001 - outermost: Ctrl-C while joining threads, shown; the end goes on
        with suppress(BaseException):
            traceback.print_exc()


def flush(*, told: bool = False) -> bool:
    """False when a stream cannot be flushed. `told`: say so of standard output, as the interpreter does."""
    whole = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException as error:  # noqa: BLE001 - outermost: whatever a script has put there
            whole = False
            if told and stream is sys.stdout:
                with suppress(BaseException):
                    sys.stderr.write(f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}\n")
    return whole


def _tear_down(preloaded: frozenset[str]) -> None:
    """Let go of the script's own modules: first by dropping them, then by emptying what is still held."""
    own = [name for name in sys.modules if name not in preloaded or name == "__main__"]
    gc.collect()  # what holds others now comes first, so that files are flushed before they are closed
    for name in ("last_type", "last_value", "last_traceback", "last_exc", "ps1", "ps2"):
        vars(sys).pop(name, None)
    sys.excepthook = sys.__excepthook__
    left: list[weakref.ref[ModuleType]] = []
    for name in own:
        left += _dropped(name)
    gc.collect()
    for reference in reversed(left):
        module = reference()
        if module is not None:
            _empty(vars(module))
    gc.collect()


def _dropped(name: str) -> list["weakref.ref[ModuleType]"]:
    module = sys.modules.pop(name)
    return [weakref.ref(module)] if isinstance(module, ModuleType) else []


def _empty(space: dict[str, object]) -> None:
    """Underscored names first, then the others, builtins last: the interpreter's order."""
    for underscored in (True, False):
        for name in list(space):
            if name != "__builtins__" and (name.startswith("_") and not name.startswith("__")) == underscored:
                with suppress(BaseException):
                    space[name] = None
