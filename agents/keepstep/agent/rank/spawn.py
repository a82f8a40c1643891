"""One child of a shim: a rank, or the rendezvous store.

The child is tied to the shim before anything else: it is killed when the shim ends. Then it is made what a
process started by hand is (signals, descriptors, limits, folder), and executes its command or, forked from a
loaded process, becomes the script.
"""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from . import become, processes
from .protocol import LaunchFile
from .turn import Turn


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a rank finds when it starts."""

    env: dict[str, str]
    output: int  # becomes its standard output and error
    keep: tuple[int, ...]  # descriptors it inherits, by number
    cgroup: Path | None
    account: Path | None = None  # where a warm rank tells what its script imports


def fork(child: Callable[[], None]) -> tuple[int, int]:
    """Run `child` in a new process that dies with this one; its pid and a pidfd. `child` must not return."""
    parent = os.getpid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid:
        held = os.pidfd_open(pid)  # while SIGCHLD is blocked: nobody has reaped it, however short it lived
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid, held
    try:
        processes.die_with(parent)
        processes.restore_signals()
        child()
    except OSError as error:
        os.write(2, f"keepstep: the rank could not be started: {error}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)
    except Exception:  # noqa: BLE001 - the outermost boundary of this process: nothing may run on as a second shim
        os.write(2, traceback.format_exc().encode())
        os._exit(126)
    os._exit(126)


def rank(
    launch: LaunchFile, around: Surroundings, loaded: become.Loaded | None, let_go: Callable[[], None]
) -> tuple[int, int]:
    """Start one rank; its pid and a pidfd. `let_go` closes, in the child, what belongs to the shim."""

    def child() -> None:
        let_go()
        env = arrive(around, cwd=launch.cwd, umask=launch.umask, limits=launch.limits)
        if loaded is not None:
            script = become.Script(
                argv=launch.argv, interpreter=launch.interpreter, env=env, account=around.account
            )
            raise Turn(lambda: become.become(script, loaded))
        execute((*launch.interpreter, *launch.argv) if launch.python else launch.argv, env)

    return fork(child)


def arrive(around: Surroundings, *, cwd: str, umask: int | None, limits: dict[str, int]) -> dict[str, str]:
    """In the rank's process: what a rank finds, but for the interpreter; the environment it is to have."""
    os.setpgid(0, 0)  # a script's `kill 0` stops at its own rank
    descriptors(around.output, around.keep)
    if around.cgroup:
        (around.cgroup / "cgroup.procs").write_text("0")
    os.chdir(cwd)
    if umask is not None:
        os.umask(umask)
    _limit(limits)
    return {**around.env, "KEEPSTEP_RANK_PID": str(os.getpid())}  # its children can tell that they are not it


def execute(command: Sequence[str], env: dict[str, str]) -> NoReturn:
    for held in range(3):
        os.set_inheritable(held, True)
    os.execvpe(command[0], list(command), env)  # noqa: S606 - no shell is wanted


def descriptors(output: int, keep: Iterable[int]) -> None:
    """/dev/null, the pipe twice, and what is kept; nothing else."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    low = 3
    for held in sorted(keep):
        os.closerange(low, held)
        os.set_inheritable(held, True)
        low = held + 1
    os.closerange(low, _highest() + 1)


def redirect(log: Path) -> None:
    """Nothing to read, and a file to speak to."""
    null = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    for source, target in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    for opened in (null, file):
        if opened > 2:
            os.close(opened)


def _highest() -> int:
    return max(int(entry) for entry in os.listdir("/proc/self/fd"))  # noqa: PTH208


def _limit(limits: dict[str, int]) -> None:
    for name, soft in limits.items():
        number = getattr(resource, f"RLIMIT_{name.upper()}")
        _, hard = resource.getrlimit(number)
        with suppress(ValueError):  # above the hard limit of this node
            wanted = hard if soft < 0 or (hard != resource.RLIM_INFINITY and soft > hard) else soft
            resource.setrlimit(number, (wanted, hard))
