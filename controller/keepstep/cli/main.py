"""Where the command line begins and ends: what is typed, what is imported for it, and the exit code.

The help of the whole is printed without importing anything but a table. All else goes to the lazy group,
whose commands raise `KeepstepError` for whatever a person can act on; here it becomes a few lines on stderr
and an exit code. A traceback is for bugs only.
"""

import os
import sys
from collections.abc import Sequence

from keepstep.core.errors import InputError, KeepstepError


def main(arguments: Sequence[str] | None = None) -> None:
    sys.exit(outcome(sys.argv[1:] if arguments is None else arguments))


def outcome(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit code; errors are printed."""
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
    except KeepstepError as error:
        _complain(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return code


def _dispatch(arguments: Sequence[str]) -> int:
    if list(arguments) in ([], ["--help"], ["-h"], ["help"]) and "_KEEPSTEP_COMPLETE" not in os.environ:
        from keepstep.cli.catalogue import help_text

        sys.stdout.write(help_text())
        return 0 if arguments else InputError.exit_code
    return _invoke(arguments)


def _invoke(arguments: Sequence[str]) -> int:
    from typer import Abort, TyperException

    from keepstep.cli.lazy import root_command

    try:
        result = root_command().main(args=list(arguments), prog_name="keepstep", standalone_mode=False)
    except TyperException as error:  # an option that does not exist, a value of the wrong kind
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command: its help is the answer
            sys.stderr.write(error.format_message() + "\n")
            return error.exit_code
        where = getattr(getattr(error, "ctx", None), "command_path", "keepstep")
        _complain(f"{where}: {error.format_message()}\n  {where} --help lists what can be given.")
        return error.exit_code
    except Abort:  # Ctrl-C or end of input at a question
        return 130
    return result if isinstance(result, int) else 0


def _complain(text: str) -> None:
    # stdout first, so that what was printed before the error stands before it in a terminal.
    sys.stdout.flush()
    red = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    sys.stderr.write(f"\x1b[31merror:\x1b[0m {text}\n" if red else f"error: {text}\n")


if __name__ == "__main__":
    main()
