"""A loaded process becomes the script, so that the script cannot tell it from a cold start.

Everything a fresh interpreter would have set from its command line, its environment and its descriptors
is set again; then `__main__` is made anew and filled. How it ends is in `leave`.

What a script can still see: modules it did not import are in sys.modules, three frames of ours lie below
its own, and strings hash alike in all ranks. Where more than that would differ, `why_cold` says so and
the rank starts cold.
"""

import builtins
import functools
import gc
import importlib
import io
import logging
import os
import random
import signal
import sys
import time
import tokenize
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO

from . import leave
from .learn import Account
from .preload import of_a_rank
from .protocol import LaunchFile

_HERE = os.path.dirname(__file__)  # noqa: PTH120 - compared with code objects' names

# Read while interpreter or preloaded modules start: with another value a fork differs from a cold start.
_READ_EARLY = (
    "PYTHON", "LC_", "LANG", "LD_", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "MALLOC_", "GLIBC_",
    "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "HF_", "TRANSFORMERS_",
)  # fmt: skip
_READ_LATE = ("TORCH_NCCL_", "TORCH_FR_")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a standby server has become by its imports."""

    interpreter: tuple[str, ...]  # as started: executable and flags
    env: dict[str, str]  # as started
    changes: dict[str, str]  # what start-up and imports have set in os.environ since
    modules: frozenset[str]  # top-level names
    reads: frozenset[str] = frozenset()  # variables that the imports looked at
    context: bool = False  # it has a CUDA context
    given: dict[str, str] = field(default_factory=dict)  # what was set for the imports, as the script does


@dataclass(frozen=True, kw_only=True)
class Script:
    argv: tuple[str, ...]
    interpreter: tuple[str, ...]
    env: dict[str, str]
    account: Path | None = None  # where it is told what the script imports


def why_cold(launch: LaunchFile, loaded: Loaded) -> str:
    """Why this launch cannot be started from this process; empty if it can."""
    if not launch.python:
        return "a native command"
    if launch.interpreter != loaded.interpreter:
        return f"another interpreter or other flags: {' '.join(launch.interpreter)}"
    for name in sorted(
        {name for rank in launch.ranks for name in _differing({**launch.env, **rank.env}, loaded)}
    ):
        return f"{name} differs from the standby server's"
    if conflict := contradiction(launch.early, loaded.reads, loaded.given):
        return conflict
    first = launch.argv[0]
    if first.startswith("-"):
        if first != "-m" or len(launch.argv) < 2:
            return f"not a script: {first}"
        folder = Path(launch.cwd)
    else:
        script = Path(launch.cwd, first)
        if script.suffix != ".py" or not script.is_file() or not _decodes(script):
            return f"not a Python source file: {first}"
        folder = script.resolve().parent
    shadow = _shadowing(folder, loaded.modules)
    return f"{folder / shadow} hides a module that is already loaded" if shadow else ""


def contradiction(early: Mapping[str, str | None], reads: Iterable[str], given: Mapping[str, str]) -> str:
    """Which variable a script sets too late for what is loaded already. `early`: None is an unknown value."""
    looked = frozenset(reads)
    for name, value in sorted(early.items()):
        if _read_early(name, looked) and (value is None or given.get(name) != value):
            return f"the script sets {name} before its imports, and what is loaded already has looked at it"
    return ""


@functools.cache
def inventory() -> tuple[frozenset[str], tuple[Callable[[], None], ...]]:
    """What was loaded when this was first asked: names, and what some modules want called in a rank.

    Asked before the first fork: a rank that looks at two thousand modules copies the page of each.
    """
    found = (
        getattr(module, "__dict__", {}).get("__keepstep_resume__") for module in list(sys.modules.values())
    )
    return frozenset(sys.modules), tuple(resume for resume in found if resume is not None)


def become(script: Script, loaded: Loaded) -> NoReturn:
    """Turn this process into the script and end as it ends."""
    gc.collect()  # what the parent's frames held goes now, before descriptors are used again
    gc.enable()
    os.environ.clear()
    os.environ.update({**{k: v for k, v in loaded.changes.items() if k not in script.env}, **script.env})
    time.tzset()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _fresh_streams()
    _fresh_chance()
    _fresh_modules()
    importlib.invalidate_caches()
    sys.orig_argv = [*script.interpreter, *script.argv]
    body = _module if script.argv[0] == "-m" else _file
    preloaded, _ = inventory()
    account = Account(script.account, dict(os.environ), preloaded) if script.account else None
    if account is not None:
        account.watch()
    leave.run(
        lambda: body(script.argv), ours=_ours, preloaded=preloaded,
        at_end=account.tell if account is not None else lambda: None,
    )  # fmt: skip


def _file(argv: tuple[str, ...]) -> None:
    path = argv[0]
    name = path if path.startswith("/") else f"{os.getcwd()}/{path}"  # noqa: PTH109
    sys.argv = list(argv)
    if not getattr(sys.flags, "safe_path", False) and not sys.flags.isolated:
        sys.path.insert(0, os.path.dirname(os.path.realpath(name)))  # noqa: PTH120
    space = _empty_main()
    space.update(__loader__=SourceFileLoader("__main__", name), __file__=name, __cached__=None)
    with open(name, "rb") as file:  # noqa: PTH123
        source = file.read()
    try:
        exec(compile(source, name, "exec", dont_inherit=True), space)  # noqa: S102 - what we are here for
    finally:
        leave.flush()  # the interpreter does it after a script and not after a module


def _module(argv: tuple[str, ...]) -> None:
    import runpy

    _, name, *rest = argv
    sys.argv = ["-m", *rest]
    if not getattr(sys.flags, "safe_path", False) and not sys.flags.isolated:
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    loaded = sys.modules.pop(name, None)  # preloaded for its imports: it runs as __main__ now
    parent, _, child = name.rpartition(".")
    if loaded is not None and parent in sys.modules:
        vars(sys.modules[parent]).pop(child, None)
    _empty_main()
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def _empty_main() -> dict[str, Any]:
    """`__main__` as an interpreter has it at first. A new one, so that it can go at the end."""
    sys.modules["__main__"] = ModuleType("__main__")
    space = vars(sys.modules["__main__"])
    if sys.version_info < (3, 14):
        space["__annotations__"] = {}
    space["__builtins__"] = builtins
    return space


def _fresh_streams() -> None:
    """New standard streams on descriptors 0 to 2, made as the interpreter makes them."""
    old_out, old_err = sys.stdout, sys.stderr
    unbuffered: bool = sys.__stdout__.write_through  # type: ignore[union-attr]  # python -u
    sys.stdin = sys.__stdin__ = _stream(0, "<stdin>", "r", sys.__stdin__, False)  # type: ignore[misc,assignment]
    sys.stdout = sys.__stdout__ = _stream(1, "<stdout>", "w", sys.__stdout__, unbuffered)  # type: ignore[misc,assignment]
    sys.stderr = sys.__stderr__ = _stream(2, "<stderr>", "w", sys.__stderr__, unbuffered)  # type: ignore[misc,assignment]
    for reference in list(logging._handlerList):  # type: ignore[attr-defined]
        handler = reference()
        if isinstance(handler, logging.StreamHandler) and handler.stream in (old_out, old_err):
            handler.setStream(sys.stdout if handler.stream is old_out else sys.stderr)


def _stream(descriptor: int, name: str, mode: str, old: TextIO | None, unbuffered: bool) -> TextIO:
    assert old is not None
    buffer: Any = open(descriptor, mode + "b", 0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    raw = getattr(buffer, "raw", buffer)
    raw.name = name
    text = io.TextIOWrapper(
        buffer, encoding=old.encoding, errors=old.errors, newline="\n", write_through=unbuffered,
        line_buffering=not unbuffered and (descriptor == 2 or raw.isatty()),
    )  # fmt: skip
    text.mode = mode  # type: ignore[misc]
    return text


def _fresh_chance() -> None:
    """Generators that a fresh process seeds by chance are seeded by chance again."""
    random.seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def _fresh_modules() -> None:
    """What preloaded modules remember of the process they were loaded in."""
    if "multiprocessing.process" in sys.modules:
        import multiprocessing.context as contexts
        from multiprocessing import process

        default: Any = contexts._default_context
        default._actual_context = None
        state: Any = process
        state._current_process = type(state._current_process)()  # with a new authkey
        state._parent_process = None
        state._children = set()
        state.ORIGINAL_DIR = os.getcwd()  # noqa: PTH109
    if "tempfile" in sys.modules:
        vars(sys.modules["tempfile"])["tempdir"] = None
    for resume in inventory()[1]:
        resume()  # its module looked at the environment when it was loaded, and knows how to look again


def _ours(filename: str) -> bool:
    return os.path.dirname(filename) == _HERE  # noqa: PTH120


def _differing(wanted: dict[str, str], loaded: Loaded) -> Iterable[str]:
    had = loaded.env
    for name in wanted.keys() | had.keys():
        early = _read_early(name, loaded.reads) or (loaded.context and name.startswith("CUDA_"))
        if wanted.get(name) != had.get(name) and not of_a_rank(name) and early:
            yield name


def _read_early(name: str, reads: Set[str]) -> bool:
    return name in reads or (name.startswith(_READ_EARLY) and not name.startswith(_READ_LATE))


def _decodes(script: Path) -> bool:
    """What cannot be decoded is refused in other words when it is compiled from memory."""
    try:
        with tokenize.open(script) as text:
            text.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return False
    return True


def _shadowing(folder: Path, modules: frozenset[str]) -> str:
    """What in the script's folder would be imported instead of something that is loaded already."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return ""
    for entry in entries:
        stem, _, suffix = entry.name.partition(".")
        if stem not in modules or stem == "__main__":
            continue
        if suffix in ("py", "pyc") or suffix.endswith("so") or (Path(entry.path) / "__init__.py").exists():
            return entry.name
    return ""
