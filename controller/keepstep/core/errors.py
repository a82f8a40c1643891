"""Errors that people see.

KeepstepError            1   what, where, why, what next
├── InputError           2   a spec, an option or a file that cannot be used as it is
├── NotFound             3   no such job, node, incident
├── Refused              4   the state or the role does not allow it
│   ├── Unauthorized     4   no token, a wrong one, or one of too small a role
│   └── Fenced           4   somebody newer holds the term or the attempt
├── Unreachable          5   controller, agent or store cannot be reached
├── TimedOut             6   a wait came to its deadline
└── JobFailed            7   the job itself ended without success

The number is the exit code of the command line. Assertions are for bugs, errors for the world.
"""

from typing import ClassVar


class KeepstepError(Exception):
    """Something a person can act on: says what happened, where, why, and what to do next."""

    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500  # of the HTTP answer

    def __init__(self, what: str, *, where: str = "", why: str = "", next: str = "") -> None:  # noqa: A002
        super().__init__(what)
        self.what, self.where, self.why, self.next = what, where, why, next

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        if self.why:
            head = f"{head} {self.why}" if head.endswith((".", ":")) else f"{head}: {self.why}"
        return f"{head}\n  {self.next}" if self.next else head


class InputError(KeepstepError):
    exit_code = 2
    status = 422


class NotFound(KeepstepError):
    exit_code = 3
    status = 404


class Refused(KeepstepError):
    exit_code = 4
    status = 409


class Unauthorized(Refused):
    status = 403


class Fenced(Refused):
    pass


class Unreachable(KeepstepError):
    exit_code = 5
    status = 503


class TimedOut(KeepstepError):
    exit_code = 6
    status = 504


class JobFailed(KeepstepError):
    exit_code = 7
