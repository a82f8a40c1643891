"""What a standby imports ahead, and whether a process that has done so still is what a cold start would be.

Three lists: modules that keepstep or the spec names (`name?` may be missing), modules that an earlier run of
the script was seen to import (`learnt`), and variables that the script sets before its imports (`given`),
which are set here for as long as the imports take.

A module that a script imports does not have to be fit to be imported ahead: it may look at its rank, start a
thread, print. So whatever is only learnt is tried first, in a child; what is unfit there is left out with
everything of its distribution, and the agent remembers it.
"""

import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from . import processes

WANTED = "wanted.json"
_TRIAL_S, _TRIALS = 120.0, 4
_OF_A_RANK = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "KEEPSTEP_")


class Unfit(RuntimeError):
    """A fork of this process would not be what a cold start is."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    modules: tuple[str, ...]
    learnt: tuple[str, ...] = ()
    tried: bool = False  # the learnt ones have been found fit before
    given: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 0  # so many processes are started ahead, instead of one that is forked from
    context: bool = False  # of those: each creates its CUDA context

    @classmethod
    def read(cls, directory: Path) -> "Wanted":
        raw = json.loads((directory / WANTED).read_bytes())
        return cls(**{**raw, "modules": tuple(raw["modules"]), "learnt": tuple(raw["learnt"])})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # with the reason
    unfit: Mapping[str, str]  # top-level names that were only learnt, and why they are left out
    reads: frozenset[str]  # variables that the imports looked at
    files: Mapping[str, tuple[int, int]]  # what was loaded: modification time and size
    load_s: float


class Reads:
    """The variables that imports look at, noted while it is entered.

    A walk over the whole environment is taken to look for the walker's own: FSSPEC_, TQDM_.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.of_a_rank: list[tuple[str, set[str]]] = []  # with the top-level names that were being imported
        self._plain = os._Environ.__getitem__, os._Environ.__iter__

    def __enter__(self) -> "Reads":
        get, walk = self._plain

        def noting_get(env: Any, name: Any) -> Any:
            self._note(os.fsdecode(name), sys._getframe(1))
            return get(env, name)

        def noting_walk(env: Any) -> Iterator[Any]:
            for importer in list(_importing(sys._getframe(1)))[:1]:
                own = f"{importer.upper()}_"
                self.names.update(name for name in walk(env) if name.startswith(own))
            return walk(env)

        os._Environ.__getitem__, os._Environ.__iter__ = noting_get, noting_walk  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        os._Environ.__getitem__, os._Environ.__iter__ = self._plain  # type: ignore[method-assign]

    def _note(self, name: str, frame: FrameType) -> None:
        self.names.add(name)
        if of_a_rank(name):
            self.of_a_rank.append((name, set(_importing(frame))))


def of_a_rank(name: str) -> bool:
    """A variable that is set for each rank, and never in a standby."""
    return name.startswith(_OF_A_RANK)


def load(wanted: Wanted) -> Outcome:
    """Errors: Unfit; ImportError for what must be there."""
    began = time.monotonic()
    missing = []
    with _given(wanted.given), Reads() as reads:
        for name in wanted.modules:
            try:
                importlib.import_module(name.removesuffix("?"))
            except ImportError as error:
                if not name.endswith("?"):
                    raise
                missing.append(f"{name.removesuffix('?')}: {error}")
        check(forked=not wanted.ranks)
        unfit = {} if wanted.tried else _try(wanted.learnt)
        for name in _without(wanted.learnt, unfit):
            try:
                importlib.import_module(name)
            except Exception as error:  # noqa: BLE001 - outermost of a strange module, which is left out
                missing.append(f"{name}: {error}")
    check(forked=not wanted.ranks)
    asked = (*(name.removesuffix("?") for name in wanted.modules), *wanted.learnt)
    return Outcome(
        loaded=tuple(name for name in asked if name in sys.modules), missing=tuple(missing), unfit=unfit,
        reads=frozenset(reads.names), files=_files(), load_s=time.monotonic() - began,
    )  # fmt: skip


def check(*, forked: bool) -> None:
    """`forked`: ranks will be forked from this process."""
    if (count := processes.threads()) > 1 and forked:
        raise Unfit(f"{count} threads after the imports: a fork would lose {count - 1}")
    if Path(f"/proc/self/task/{os.getpid()}/children").read_text().strip():
        raise Unfit("the imports started a process")
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise Unfit("the imports initialised a process group")
    if torch is not None and forked and torch.cuda.is_initialized():
        raise Unfit("the imports initialised CUDA")


def changed(files: Mapping[str, tuple[int, int]]) -> str:
    """The first file that is no longer what was loaded from it; "": none."""
    return next((path for path, seen in files.items() if _stamp(path) != seen), "")


def _files() -> dict[str, tuple[int, int]]:
    own = str(Path(__file__).parent)
    paths = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return {p: seen for p in paths if isinstance(p, str) and not p.startswith(own) and (seen := _stamp(p))}


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - thousands of them
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class _given:  # noqa: N801 - reads as a statement
    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._given}
        os.environ.update(self._given)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is not None:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)


# -- the trial


def _try(learnt: tuple[str, ...]) -> dict[str, str]:
    """Import in a child what was only learnt, until nothing in it is unfit: top-level names and why."""
    unfit: dict[str, str] = {}
    for _ in range(_TRIALS):
        rest = _without(learnt, unfit)
        found = _trial(rest) if rest else {}
        unfit |= found
        if not found:
            return unfit
    return unfit | {_top(name): "it depends on what is unfit" for name in _without(learnt, unfit)}


def _trial(names: tuple[str, ...]) -> dict[str, str]:
    answer, told = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        processes.die_with(parent)
        os.setpgid(0, 0)  # what the modules start is ended with it
        try:
            _told(names, lambda word: os.write(told, json.dumps(word).encode() + b"\n"))
        finally:
            os._exit(0)
    os.close(told)
    said, deadline_s = b"", time.monotonic() + _TRIAL_S
    while select.select([answer], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
        data = os.read(answer, 1 << 16)
        if not data:
            break
        said += data
    with suppress(ProcessLookupError):  # it never came so far
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(answer)
    words = [json.loads(line) for line in said.splitlines() if line.endswith(b"}")]
    tops = {_top(name) for name in names}
    unfit = {top: word["why"] for word in words if "why" in word for top in word["unfit"] if top in tops}
    if names and not any("done" in word for word in words):
        last = next((word["began"] for word in reversed(words) if "began" in word), names[0])
        unfit[_top(last)] = f"importing {last} did not end"
    return unfit


def _told(names: tuple[str, ...], tell: Callable[[dict[str, Any]], object]) -> None:
    """The child: import one by one, and tell what each did beside."""
    spoken = os.memfd_create("spoken")
    os.dup2(spoken, 1)
    os.dup2(spoken, 2)
    threads, children, heard = processes.threads(), "", 0
    with Reads() as reads:
        for name in names:
            tell({"began": name})
            try:
                importlib.import_module(name)
            except BaseException as error:  # noqa: BLE001 - outermost of a strange module
                tell({"unfit": [_top(name)], "why": f"{name} cannot be imported: {error}"})
            for variable, importers in reads.of_a_rank:
                tell(
                    {
                        "unfit": sorted(importers | {_top(name)}),
                        "why": f"it looks at {variable} when imported",
                    }
                )
            reads.of_a_rank.clear()
            if (now := processes.threads()) != threads:
                tell({"unfit": [_top(name)], "why": f"{name} starts a thread"})
                threads = now
            if (born := Path(f"/proc/self/task/{os.getpid()}/children").read_text()) != children:
                tell({"unfit": [_top(name)], "why": f"{name} starts a process"})
                children = born
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            if (length := os.fstat(spoken).st_size) != heard:
                tell({"unfit": [_top(name)], "why": f"{name} prints when imported"})
                heard = length
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            tell({"unfit": [_top(name) for name in names], "why": "the imports initialise CUDA"})
    tell({"done": True})


def _importing(frame: FrameType | None) -> Iterator[str]:
    """Top-level names of the modules whose import is under way, the innermost first."""
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            yield _top(str(frame.f_globals.get("__name__")))
        frame = frame.f_back


def _without(names: Iterable[str], unfit: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name in names if _top(name) not in unfit)


def _top(name: str) -> str:
    return name.partition(".")[0]
