"""The four programs of this folder, and how each leaves its starter.

shim DIR             one attempt's ranks, cold: detached, prints its pid
standby DIR          the standby server: detached, prints its pid
ahead FD DIR K       a process that waits to become a rank; -1: to become the store
store FD READY HOST  the rendezvous store on a listening socket that was bound beforehand
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import ahead, rendezvous, shim, standby, turn
from .protocol import LOG
from .spawn import redirect


def main(argv: list[str]) -> None:
    match argv:
        case ["shim", folder]:
            directory = Path(folder)
            _detached(directory / LOG, lambda: shim.main(directory, None))
        case ["standby", folder]:
            directory = Path(folder)
            _detached(directory / standby.LOG, lambda: standby.main(directory))
        case ["ahead", descriptor, folder, k]:
            turn.run(lambda: ahead.wait(int(descriptor), Path(folder), int(k), standby.load))
        case ["store", listener, ready, host]:
            rendezvous.serve(int(listener), int(ready), host)
        case _:
            raise SystemExit(f"{__doc__}\nnot understood: {argv}")


def _detached(log: Path, program: Callable[[], None]) -> None:
    """In a session of its own, nobody's child, its words in a file. The starter prints the pid and ends."""
    if os.fork():
        os.wait()
        return
    os.setsid()
    pid = os.fork()
    if pid:
        os.write(1, b"%d\n" % pid)
        os._exit(0)
    redirect(log)
    os.closerange(3, 1 << 16)
    turn.run(program)
    sys.exit(0)
