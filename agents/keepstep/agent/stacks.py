"""Stacks of a rank's main thread, innermost frame first: "file:line function".

Two sources say the same: the rank's control server (it asks the interpreter, which must let it), and py-spy,
which reads the memory of a process that can do nothing any more.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

FRAMES_MAX, _FRAME_CHARACTERS = 64, 300
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?)(?: in (?P<function>.*))?')


def of_traceback(text: str) -> tuple[str, ...]:
    """From what faulthandler writes: one block for each thread, the newest first, so the main one last."""
    main: list[str] = []
    for line in text.splitlines():
        if line.startswith(("Thread ", "Current thread ")):
            main = []
        elif frame := _FRAME.fullmatch(line):
            main.append(f"{frame['file']}:{frame['line']} {frame['function'] or '?'}")
    return _bounded(main)


def of_pyspy(document: bytes) -> tuple[str, ...]:
    """From `py-spy dump --json`. Errors: ValueError for anything else."""
    threads: Any = json.loads(document)
    if not isinstance(threads, list) or not all(isinstance(thread, dict) for thread in threads):
        raise ValueError("py-spy wrote no list of threads")
    named = [thread for thread in threads if thread.get("thread_name") == "MainThread"]
    main: dict[str, Any] = next(iter(named or threads[-1:]), {})
    return _bounded(
        f"{frame.get('filename', '?')}:{frame.get('line', '?')} {frame.get('name', '?')}"
        for frame in main.get("frames") or ()
    )


def _bounded(frames: Iterable[str]) -> tuple[str, ...]:
    return tuple(frame[:_FRAME_CHARACTERS] for frame in list(frames)[:FRAMES_MAX])
