"""Printing the same thing again and again, for --watch."""

import io
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout

from keepstep.core.errors import Unreachable

_LOST_MAX = 15  # looks in a row without an answer, then the error stands


def repeat(show: Callable[[], None], *, watch: bool, every_s: float = 1.0) -> None:
    """Call `show` once, or until Ctrl-C: on a terminal redrawn in place, else printed when it changed."""
    if not watch:
        show()
        return
    last, lost = "", 0
    while True:
        text = _Text(terminal=sys.stdout.isatty())
        try:
            with redirect_stdout(text):
                show()
            lost = 0
        except Unreachable as error:
            # A controller that is being restarted comes back; what it said last stays on the screen.
            lost += 1
            if lost >= _LOST_MAX:
                raise
            print(f"keepstep: {error.what}, trying again", file=sys.stderr)
        else:
            if text.getvalue() != last:
                last = text.getvalue()
                sys.stdout.write(f"\x1b[H\x1b[J{last}" if text.isatty() else last)
                sys.stdout.flush()
        time.sleep(every_s)


class _Text(io.StringIO):
    """Collects output that is drawn as for the real stdout."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal
