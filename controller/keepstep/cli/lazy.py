"""The root of the command line: a group whose commands are imported when they are needed."""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from keepstep.cli import catalogue
from keepstep.cli.coercion import lighten
from keepstep.core.errors import InputError

_HELP = ["-h", "--help"]


class LazyGroup(TyperGroup):
    """Knows its commands from the catalogue."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [entry.name for entry in catalogue.entries()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = catalogue.find(cmd_name)
        if entry is None:
            return None
        group = get_group(import_module(f"keepstep.cli.{entry.module}").app)
        found = group if entry.group else group.commands[entry.name]
        found.name = entry.name
        for command in [found, *getattr(found, "commands", {}).values()]:
            lighten(command, ctx)
        return found

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and catalogue.find(args[0]) is None and not args[0].startswith("-"):
            near = catalogue.closest(args[0])
            hint = f"Did you mean `keepstep {near}`?" if near else "`keepstep --help` lists them."
            raise InputError(f"there is no command {args[0]!r}", where="keepstep", next=hint)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Names from the catalogue, since completing a command need not import them all."""
        from typer._click.shell_completion import CompletionItem

        names = [
            CompletionItem(entry.name, help=entry.summary)
            for entry in catalogue.entries()
            if entry.name.startswith(incomplete)
        ]
        return names if not incomplete.startswith("-") else super().shell_complete(ctx, incomplete)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(catalogue.help_text())


app = typer.Typer(
    name="keepstep",
    cls=LazyGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": _HELP},
)


@app.callback()
def root(
    ctx: typer.Context,
    context: str = typer.Option("", "--context", help="The controller to talk to."),
    version: bool = typer.Option(False, "--version", help="Print the version."),
) -> None:
    """Keeps every rank of a training job in step."""
    ctx.obj = {"context": context}
    if version:
        from importlib.metadata import version as version_of

        print(f"keepstep {version_of('keepstep')}")
        raise typer.Exit


def root_command() -> Any:
    command = get_command(app)
    lighten(command, typer.Context(command, help_option_names=_HELP))
    return command
