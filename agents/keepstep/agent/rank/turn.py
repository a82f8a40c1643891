"""How a forked process becomes something else without carrying its parent's stack along.

Deep inside a server's loop, a fork's child raises `Turn`: every frame of the parent's loop ends and lets
go of what it held, and the next thing runs from the bottom of the stack, as in a process that was just
started.
"""

from collections.abc import Callable


class Turn(BaseException):
    """Not an error: leave everything and run `into` instead."""

    def __init__(self, into: Callable[[], None]) -> None:
        super().__init__()
        self.into = into


def run(step: Callable[[], None]) -> None:
    while True:
        try:
            return step()
        except Turn as turn:
            step = turn.into  # run outside of the handler: a script's errors are not chained to this one
