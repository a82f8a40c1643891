"""Commands that the built-in trainer answers, in a process that this one becomes: only there is PyTorch.

Everything after the command's name is the trainer's to read, --help included.
"""

import os
import sys
from importlib.util import find_spec

import typer

from keepstep.core.errors import InputError

app = typer.Typer(rich_markup_mode=None)
_ALL = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command("generate", context_settings=_ALL, add_help_option=False)
def generate(ctx: typer.Context) -> None:
    """Let a trained model continue texts."""
    become("keepstep.llama.generation", ctx.args)


@app.command("data", context_settings=_ALL, add_help_option=False)
def data(ctx: typer.Context) -> None:
    """Tokenise text once, for training; verify and show what was made."""
    become("keepstep.llama.data", ctx.args)


@app.command("weights", context_settings=_ALL, add_help_option=False)
def weights(ctx: typer.Context) -> None:
    """Weights out of checkpoints; verified."""
    become("keepstep.llama.weights", ctx.args)


def become(module: str, arguments: list[str]) -> None:
    """Does not return. InputError where the trainer's libraries are not installed."""
    if find_spec("torch") is None:
        raise InputError(
            "the built-in trainer is not installed here", where="keepstep", why="there is no torch",
            next="Install keepstep[train], or run this where the trainer runs.",
        )  # fmt: skip
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - no shell is wanted
