"""Trials of folders, each in a process of its own, so that one that hangs holds up nobody.

A process that hangs in the kernel cannot be killed before the file system lets it go: there is one for a
folder at most, and the folder is not tried again before it is gone.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from os import getpid
from pathlib import Path

from keepstep.agent.probes.storage import evolution
from keepstep.agent.probes.storage.evolution import Answer
from keepstep.agent.probes.storage.thresholds import Thresholds
from keepstep.core.clock import Clock
from keepstep.wire.health import Check

_TRIAL = Path(__file__).with_name("trial.py")
_AT_ONCE = 4
_REAP_WITHIN_S = 1.0  # a killed process takes milliseconds, on a busy machine more; one that hangs, for ever


@dataclass(slots=True)
class _Folder:
    due: float
    process: "subprocess.Popen[bytes] | None" = None
    began: float = 0.0
    hangs_since: float | None = None
    answer: Answer | None = None


class Trials:
    def __init__(self, clock: Clock, limits: Thresholds | None = None) -> None:
        self._clock, self._limits = clock, limits or Thresholds()
        self._folders: dict[str, _Folder] = {}

    @property
    def folders(self) -> int:
        return len(self._folders)

    def turn(self, wanted: Iterable[str]) -> None:
        """Begin what is due, take what has answered, end what hangs. Blocks for nothing."""
        now = self._clock.monotonic()
        keep = set(wanted)
        for name in keep - self._folders.keys():
            self._folders[name] = _Folder(now + self._limits.first_s)
        for name, folder in list(self._folders.items()):
            if folder.process is not None:
                self._look(folder, now)
            if name not in keep and folder.process is None:
                del self._folders[name]
        busy = sum(folder.process is not None for folder in self._folders.values())
        for name, folder in self._folders.items():
            if folder.process is None and now >= folder.due and busy < _AT_ONCE:
                busy += 1
                self._begin(name, folder, now)

    def checks(self) -> tuple[Check, ...]:
        return tuple(
            check
            for name, folder in self._folders.items()
            if folder.answer is not None
            for check in evolution.checks(name, folder.answer, self._limits)
        )

    def hanging(self) -> list[str]:
        return [n for n, f in self._folders.items() if f.answer and f.answer.hangs_s >= self._limits.hang_s]

    def end(self) -> None:
        """Kill what runs, and reap it; but for what the kernel does not let go."""
        running = [folder.process for folder in self._folders.values() if folder.process is not None]
        for process in running:
            process.kill()
        until = self._clock.monotonic() + _REAP_WITHIN_S
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - self._clock.monotonic()))
            _close(process)

    def _begin(self, name: str, folder: _Folder, now: float) -> None:
        command = [sys.executable, "-I", "-S", str(_TRIAL), name, str(self._limits.size), str(getpid())]
        folder.began, folder.due = now, now + self._limits.every_s
        try:
            folder.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                cwd="/", start_new_session=True, env={},
            )  # fmt: skip
        except OSError as error:
            folder.answer = Answer(stage="start", error=str(error))

    def _look(self, folder: _Folder, now: float) -> None:
        process = folder.process
        assert process is not None
        if process.poll() is not None:
            folder.process = None
            if folder.hangs_since is not None and process.returncode < 0:  # it could be killed: once more
                folder.due = now
                _close(process)
            else:
                folder.answer, folder.hangs_since = _read(process), None
        elif folder.hangs_since is None and now - folder.began >= self._limits.hang_s:
            folder.hangs_since = folder.began
        if folder.process is not None and now - folder.began >= self._limits.hang_s:
            process.kill()
        if folder.hangs_since is not None:
            folder.answer = Answer(hangs_s=now - folder.hangs_since)


def _read(process: "subprocess.Popen[bytes]") -> Answer:
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.read() or b"{}")
    except ValueError:
        told = {}
    finally:
        _close(process)
    if not told:
        return Answer(stage="trial", error=f"its process ended with {process.returncode} and said nothing")
    told.pop("errno", None)
    return Answer(**told)


def _close(process: "subprocess.Popen[bytes]") -> None:
    if process.stdout is not None:
        with suppress(OSError):
            process.stdout.close()
