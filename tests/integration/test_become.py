# ruff: noqa: E501 - scripts are quoted as they are run
"""A script cannot tell a warm start from a cold one: what it prints and how it ends is the same, to the byte.

Warm is forked from a standby server, or become by a process that was started ahead.
"""

import asyncio
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from keepstep.agent.rank.preload import Wanted
from keepstep.agent.standby import StandbyServer
from shims import ENV, WITHIN_S, launch_file, launched, run, said, script, until

MODULES = (
    "json",
    "logging",
    "multiprocessing.synchronize",
    "multiprocessing.pool",
    "tempfile",
    "random",
    "threading",
)

SCRIPTS = {
    "names": """
import sys, os
print(__name__, __file__, __spec__, __package__, __doc__, __cached__, __annotations__, type(__loader__).__name__)
print(list(globals()), __loader__.path, __builtins__.__name__)
print(sys.argv, sys.orig_argv, sys.path, sys.flags, sys.executable, sys.warnoptions)
print(os.getcwd(), sys.modules["__main__"].__dict__ is globals())
""",
    "traceback": """
def inner(n):
    raise ValueError(f"bad {n}")
def outer():
    try:
        inner(1)
    except ValueError as error:
        raise RuntimeError("worse") from error
outer()
""",
    "late": "print('before')\n1/0\n",
    "globals_at_the_end": "import atexit\nclass Loud:\n    def __del__(self): print(name, helper())\ndef helper(): return 'helped'\nname = 'n'\nloud = Loud()\n",
    "syntax": "print('never')\ndef f(:\n    pass\n",
    "encoding_declared": "# -*- coding: latin-1 -*-\nprint(len('\u00e4'), ascii('\u00e4'))\n",
    "exit_none": "import sys; sys.exit()",
    "exit_zero": "import sys; print('x'); sys.exit(0)",
    "exit_three": "raise SystemExit(3)",
    "exit_big": "raise SystemExit(259)",
    "exit_negative": "raise SystemExit(-1)",
    "exit_huge": "raise SystemExit(1 << 70)",
    "exit_true": "raise SystemExit(True)",
    "exit_words": "raise SystemExit('these words')",
    "exit_tuple": "raise SystemExit((1, 2))",
    "exit_in_function": "import sys\ndef f():\n    try:\n        sys.exit(4)\n    finally:\n        print('finally')\nf()",
    "interrupted": "import os, signal, atexit\natexit.register(print, 'at exit')\nos.kill(os.getpid(), signal.SIGINT)\n",
    "killed": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n",
    "aborted": "import os\nprint('lost, as buffered')\nos.abort()\n",
    "own_excepthook": "import sys\nsys.excepthook = lambda *a: print('hook', a[0], a[1], a[2].tb_lineno, a[2].tb_next)\n1/0\n",
    "broken_excepthook": "import sys\ndef hook(*a):\n    raise KeyError('hook')\nsys.excepthook = hook\n1/0\n",
    "exiting_excepthook": "import sys\ndef hook(*a):\n    raise SystemExit(9)\nsys.excepthook = hook\n1/0\n",
    "base_exception": "class Odd(BaseException): pass\nraise Odd('odd')\n",
    "group": "raise ExceptionGroup('several', [ValueError(1), KeyError('k')])\n",
    "note": "e = ValueError('v'); e.add_note('noted'); raise e\n",
    "print_exc": """
import traceback, sys
try:
    1 / 0
except ZeroDivisionError:
    traceback.print_exc()
print(sys.exc_info())
try:
    raise KeyError
except KeyError as error:
    print(repr(error.__context__))
""",
    "atexit": """
import atexit, threading, time
atexit.register(print, "first registered")
atexit.register(print, "second registered")
def late():
    time.sleep(0.05)
    print("thread done")
threading.Thread(target=late).start()
print("main done")
""",
    "atexit_fails": "import atexit\ndef bad():\n    raise ValueError('in atexit')\natexit.register(bad)\nprint('x')\n",
    "thread_fails": "import threading\nt = threading.Thread(target=lambda: 1/0, name='T')\nt.start(); t.join()\nprint('on')\n",
    "finalizers": """
import weakref, sys
class Loud:
    def __init__(self, name): self.name = name
    def __del__(self): print("del", self.name)
public, _private = Loud("public"), Loud("private")
cycle = Loud("cycle"); cycle.me = cycle
weakref.finalize(public, print, "finalized")
unclosed = open("unclosed.txt", "w"); unclosed.write("written at the end")
print("end")
""",
    "read_unclosed": "import os; print(os.path.exists('unclosed.txt'))",
    "sibling_holds": """
import beside
class Loud:
    def __del__(self): print("del in sibling")
beside.keep.append(Loud())
beside.stream = open("beside.txt", "w"); beside.stream.write("x")
""",
    "pickle_main": """
import pickle
class Thing:
    def __init__(self): self.x = 1
data = pickle.dumps(Thing())
print(data, pickle.loads(data).x, Thing.__module__)
import atexit
atexit.register(lambda: print(type(pickle.loads(data)).__qualname__))
""",
    "spawn": """
import multiprocessing as mp, os, sys
def work(n):
    return n * n, __name__, sys.argv
class Later:
    pass
if __name__ == "__main__":
    print(mp.get_start_method(allow_none=True), mp.current_process().name, len(mp.current_process().authkey))
    mp.set_start_method("spawn")
    with mp.Pool(2) as pool:
        print(pool.map(work, [1, 2, 3]))
    print(mp.active_children(), mp.process.ORIGINAL_DIR)
""",
    "fork": """
import multiprocessing as mp
def work(queue, n):
    queue.put((n, mp.current_process().name, __name__))
queue = mp.Queue()
workers = [mp.Process(target=work, args=(queue, n)) for n in range(3)]
for w in workers: w.start()
print(sorted(queue.get() for _ in workers))
for w in workers: w.join()
print([w.exitcode for w in workers])
""",
    "concurrent": """
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
with ProcessPoolExecutor(2) as pool: print(list(pool.map(abs, [-1, -2])))
with ThreadPoolExecutor(2) as pool: print(list(pool.map(abs, [-1, -2])))
""",
    "streams": """
import sys, os
for s in (sys.stdin, sys.stdout, sys.stderr):
    print(s, s.encoding, s.errors, s.line_buffering, s.write_through, s.newlines, s.fileno(), s.mode, s.seekable(),
          type(s.buffer).__name__, s.buffer.name, getattr(s.buffer, "raw", s.buffer).closefd, s.isatty())
print(sys.stdin.read() == "", sys.__stdout__ is sys.stdout, sys.getfilesystemencoding(), sys.getdefaultencoding())
sys.stdout.write("no newline"); sys.stdout.flush(); sys.stderr.write("err \\u00e4 \\udcff"); os.write(1, b" raw")
""",
    "order": "import sys, os\nprint('out 1'); print('err 1', file=sys.stderr); print('out 2'); os.system('echo child')\n",
    "closed_stdout": "import sys\nsys.stdout.close()\n",
    "broken_pipe": "import os, sys\nr, w = os.pipe(); os.close(r); os.dup2(w, 1)\nprint('x')\n",
    "logging": "import logging\nlogging.warning('to stderr')\nlogging.basicConfig(format='%(process)d', level=10)\nprint(logging.getLogger().handlers)\n",
    "warnings": "import warnings\ndef f():\n    warnings.warn('w', stacklevel=2)\nf()\nwarnings.warn('deprecated', DeprecationWarning)\n",
    "signals": """
import signal
print([(s, signal.getsignal(s)) for s in sorted(signal.valid_signals()) if signal.getsignal(s) != signal.SIG_DFL])
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.set_wakeup_fd(-1), signal.getitimer(signal.ITIMER_REAL))
""".replace("signal.getsignal(s))", "getattr(signal.getsignal(s), '__name__', signal.getsignal(s)))"),
    "process": """
import os, threading, time, gc
print(os.path.exists("/proc/self/fd/3"), len(os.listdir("/proc/self/task")), threading.current_thread(), threading.main_thread().ident == threading.get_ident())
print(gc.isenabled(), gc.get_threshold(), os.getpgrp() == os.getpid(), sorted(k for k in os.environ))
print(os.environb[b"KEEPSTEP_ATTEMPT"], os.getenv("TZ"), time.tzname, open("/proc/self/comm").read())
import subprocess
print(subprocess.run(["sh", "-c", "echo $KEEPSTEP_ATTEMPT $RANK; env | sort | cut -d= -f1"], capture_output=True, text=True).stdout)
""",
    "locale": """
import locale, time, sys
print(locale.getlocale(), locale.getpreferredencoding(), locale.setlocale(locale.LC_ALL), sys.flags.utf8_mode)
print("\u00e4\u20ac")
""",
    "tempfile": "import tempfile, os\nprint(tempfile.gettempdir())\nwith tempfile.NamedTemporaryFile() as f: print(os.path.dirname(f.name))\n",
    "random": "import random\nprint(type(random.random()), random.Random(3).random())\n",
    "recursion": "def f(n): return f(n + 1)\ntry:\n    f(0)\nexcept RecursionError as e: print(e)\n",
    "args": "import argparse, sys\np = argparse.ArgumentParser(); p.add_argument('--n', type=int); print(p.parse_args(), p.prog)\n",
    "bad_args": "import argparse, sys\np = argparse.ArgumentParser(); p.add_argument('m', type=int); print(p.parse_args(['x']))\n",
    "reimport": "import script, sys\nprint(script.__name__, script is sys.modules['__main__'])\n",
    "inspect": "import inspect\ndef f(): pass\nprint(inspect.getsource(f), inspect.getfile(f), inspect.getmodule(f))\n",
    "runpy": "import runpy\nopen('other.py', 'w').write('print(__name__, __file__)')\nrunpy.run_path('other.py', run_name='__main__')\nprint(__name__)\n",
    "exec_self": "import os, sys\nif len(sys.argv) == 3:\n    os.execv(sys.executable, [sys.executable, *sys.argv, 'again'])\nprint(sys.argv)\n",
    "os_exit": "import os\nprint('lost')\nos._exit(6)\n",
    "faulthandler": "import faulthandler\nprint(faulthandler.is_enabled())\n",
    "dataclass": "from __future__ import annotations\nimport dataclasses, typing\n@dataclasses.dataclass\nclass D:\n    x: int = 1\nprint(D(), typing.get_type_hints(D))\n",
    "future_leak": "def f(x: undefined_name): pass\n",
    "asyncio": "import asyncio\nasync def main():\n    await asyncio.sleep(0)\n    raise ValueError('async')\nasyncio.run(main())\n",
}  # fmt: skip

_VARYING = [(re.compile(r"0x[0-9a-f]{6,}"), "0x"), (re.compile(r"/(cold|forked|ahead)\b"), "/start"), (re.compile(r"(Process|Thread)-\d+|pid=\d+|\b\d{12,}\b"), "N")]  # fmt: skip


@dataclass(frozen=True)
class Standby:
    forked: StandbyServer
    ahead: StandbyServer


@pytest.fixture(scope="module")
def standby(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standby]:
    folder = tmp_path_factory.mktemp("standby")
    forked, ahead = (
        StandbyServer(
            folder / name, interpreter=(sys.executable,), env=ENV, cwd="/",
            wanted=Wanted(modules=MODULES, ranks=ranks),
        )
        for name, ranks in (("forked", 0), ("ahead", 1))
    )  # fmt: skip
    asyncio.run(forked.ensure(timeout_s=WITHIN_S))
    yield Standby(forked, ahead)
    asyncio.run(forked.stop())
    asyncio.run(ahead.stop())


def _seen(
    tmp_path: Path, server: StandbyServer | None, text: str, argv: tuple[str, ...], *, name: str, how: str
) -> tuple[object, ...]:
    """What a script says, how it ends, and what it has written."""
    warm = server is not None
    folder, directory = tmp_path / how, tmp_path / f"launch-{how}"
    script(folder, "keep = []\n", "beside.py")
    script(folder / "pkg", "", "__init__.py")
    (folder / name).write_bytes(text.encode("latin-1" if "latin-1" in text else "utf-8"))
    file = replace(launch_file(folder, argv, warm=warm), job=tmp_path.name)

    async def check() -> tuple[object, ...]:
        if server is not None:
            await server.ensure(timeout_s=WITHIN_S)  # what was started ahead serves once
        async with launched(directory, file, standby=server) as shim:
            assert shim.status.warm is warm, shim.status.note
            ending = await shim.ended(timeout_s=WITHIN_S)
            return ending.ranks[0].exit_code, ending.ranks[0].signal

    end = asyncio.run(check())
    words = said(directory)
    for pattern, instead in _VARYING:
        words = pattern.sub(instead, words)
    return (*end, words, {path.name: path.read_bytes() for path in sorted(folder.rglob("*.txt"))})


def _compare(
    tmp_path: Path, standby: Standby, text: str, argv: tuple[str, ...], *, name: str = "script.py"
) -> object:
    """Its exit code, which is the same in all three ways."""
    cold = _seen(tmp_path, None, text, argv, name=name, how="cold")
    for how, server in (("forked", standby.forked), ("ahead", standby.ahead)):
        assert _seen(tmp_path, server, text, argv, name=name, how=how) == cold, how
    return cold[0]


@pytest.mark.parametrize("case", SCRIPTS)
def test_a_script(tmp_path: Path, standby: Standby, case: str) -> None:
    _compare(tmp_path, standby, SCRIPTS[case], ("script.py", "--n", "3"))


@pytest.mark.parametrize(
    "case",
    [
        "names",
        "traceback",
        "late",
        "syntax",
        "exit_three",
        "exit_words",
        "interrupted",
        "spawn",
        "pickle_main",
        "finalizers",
    ],
)
def test_a_module(tmp_path: Path, standby: Standby, case: str) -> None:
    _compare(tmp_path, standby, SCRIPTS[case], ("-m", "pkg.mod", "--n", "3"), name="pkg/mod.py")


@pytest.mark.parametrize("path", ["./script.py", "pkg/../script.py", "pkg/deep.py"])
def test_a_path(tmp_path: Path, standby: Standby, path: str) -> None:
    name = "pkg/deep.py" if "deep" in path else "script.py"
    assert _compare(tmp_path, standby, SCRIPTS["names"] + "\n1/0\n", (path, "x"), name=name) == 1


@pytest.mark.parametrize("module", ["nothing.there", "pkg", "beside.not_a_package"])
def test_a_module_that_cannot_be_run(tmp_path: Path, standby: Standby, module: str) -> None:
    assert _compare(tmp_path, standby, "", ("-m", module)) == 1


def test_two_ranks_have_chance_of_their_own(tmp_path: Path, standby: Standby) -> None:
    text = "import random, tempfile, uuid, secrets\nprint(random.random(), next(tempfile._get_candidate_names()))\n"
    file = launch_file(tmp_path, script(tmp_path, text), ranks=2, warm=True)
    asyncio.run(run(tmp_path / "1", file, standby=standby.forked))
    assert len(set(said(tmp_path / "1").split() + said(tmp_path / "1", 1).split())) == 4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"argv": ("-c", "print('c')")}, "not a script"),
        ({"argv": ("folder",)}, "not a Python source file"),
        ({"argv": ("latin.py",)}, "not a Python source file"),
        ({"argv": ("sh", "-c", "echo c"), "python": False}, "a native command"),
        ({"env": {**ENV, "PYTHONHASHSEED": "1"}}, "PYTHONHASHSEED differs"),
        ({"env": {**ENV, "OMP_NUM_THREADS": "2"}}, "OMP_NUM_THREADS differs"),
        ({"argv": ("shadowed/script.py",)}, "json.py hides a module"),
        ({"interpreter": "flags"}, "other flags"),
    ],
)
def test_what_would_differ_starts_cold(
    tmp_path: Path, standby: Standby, change: dict[str, object], why: str
) -> None:
    argv = script(tmp_path, "print('c')")
    script(tmp_path / "folder", "print('c')", "__main__.py")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe4'")
    script(tmp_path / "shadowed", "print('c')")
    script(tmp_path / "shadowed", "", "json.py")
    file = launch_file(tmp_path, argv, warm=True)
    if change.get("interpreter"):
        change = {"interpreter": (*file.interpreter, "-O")}
    file = replace(file, **change)  # type: ignore[arg-type]

    async def check() -> None:
        async with launched(tmp_path / "1", file, standby=standby.forked) as shim:
            assert not shim.status.warm
            assert why in shim.status.note
            ending = await shim.ended(timeout_s=WITHIN_S)
            assert (ending.ranks[0].exit_code, said(tmp_path / "1")) == (0, "c\n") or "latin" in str(change)

    asyncio.run(check())


def test_a_warm_rank_takes_signals_as_a_cold_one(tmp_path: Path, standby: Standby) -> None:
    text = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: print("usr1", flush=True))
print("up", flush=True)
try:
    while True:
        time.sleep(600)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(12)
"""

    async def check() -> None:
        file = launch_file(tmp_path, script(tmp_path, text), warm=True)
        async with launched(tmp_path / "1", file, standby=standby.forked) as shim:
            until(lambda: said(tmp_path / "1"))
            await shim.signal("USR1")
            until(lambda: "usr1" in said(tmp_path / "1"))
            await shim.signal(signal.SIGINT.name)
            assert (await shim.ended(timeout_s=WITHIN_S)).ranks[0].exit_code == 12

    asyncio.run(check())
