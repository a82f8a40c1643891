"""Options and arguments that many commands share, and completion with live names."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from keepstep.cli.client import Client
from keepstep.cli.render import check_format
from keepstep.core.errors import InputError, KeepstepError, NotFound

COMPLETION_S = 1.5  # nobody waits longer for a Tab


def _live(path: str, key: str, names: tuple[str, ...]) -> Callable[..., list[str]]:
    """Completion from a list of the controller's; nothing when it cannot be asked quickly."""

    def complete(ctx: typer.Context, args: list[str], incomplete: str) -> list[str]:
        from dataclasses import replace

        from keepstep.cli.context import connect

        try:
            client = replace(connect(ctx, start=False), connect_s=COMPLETION_S, answer_s=COMPLETION_S)
            rows = client.get(path, limit=200)[key]
        except (KeepstepError, KeyError):
            return []
        found = dict.fromkeys(str(row[name]) for row in rows for name in names if row.get(name))
        return [name for name in found if name.startswith(incomplete)]

    return complete


jobs_alive = _live("/jobs", "jobs", ("id", "name"))
nodes_alive = _live("/nodes", "nodes", ("name",))
incidents_alive = _live("/incidents", "incidents", ("id",))

JobRef = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="Id, unique prefix, name of the newest, or @last.", autocompletion=jobs_alive
    ),
]
NodeRef = Annotated[str, typer.Argument(metavar="NODE", help="Name of a node.", autocompletion=nodes_alive)]
Output = Annotated[
    str,
    typer.Option(
        "--output", "-o", metavar="table|wide|json|yaml|name", help="What to print.", callback=check_format
    ),
]
Watch = Annotated[
    bool, typer.Option("--watch", "-w", help="Print again whenever it changes; Ctrl-C ends it.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; needed where there is no terminal.")]
Reason = Annotated[str, typer.Option("--reason", help="Written down with what is done.")]
Timeout = Annotated[str, typer.Option("--timeout", help="Give up after this long: 90s, 10m, 2h.")]


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be undone. Without a terminal only --yes will do."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError(f"{question} Nobody can be asked here.", next="Add --yes to say so.")
    typer.confirm(question, abort=True, err=True)


def duration_s(text: str, option: str) -> float:
    """Seconds of 90, 90s, 10m, 2h, 1d."""
    number, unit = text.strip(), 1.0
    for letters, size in (
        ("ms", 1e-3),
        ("s", 1.0),
        ("min", 60.0),
        ("m", 60.0),
        ("h", 3600.0),
        ("d", 86_400.0),
    ):
        if number.endswith(letters):
            number, unit = number[: -len(letters)].strip(), size
            break
    try:
        value = float(number) * unit
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise InputError(f"{text!r} is no duration", where=option, next="Give one like 90s, 10m, 2h or 1d.")
    return value


@contextmanager
def suggesting(client: Client, reference: str, path: str = "/jobs", key: str = "jobs") -> Iterator[None]:
    """Add "did you mean" to a name that was not found."""
    try:
        yield
    except NotFound as error:
        if error.next:
            raise
        near = _near(client, reference, path, key)
        noun = {"jobs": "list", "nodes": "node list"}.get(key, key)
        hint = f"Did you mean {near}?" if near else f"`keepstep {noun}` shows what there is."
        raise NotFound(error.what, where=error.where, why=error.why, next=hint) from error


def _near(client: Client, reference: str, path: str, key: str) -> str:
    import difflib

    try:
        rows: list[dict[str, Any]] = client.get(path, limit=200)[key]
    except (KeepstepError, KeyError):
        return ""
    names = [str(row[field]) for row in rows for field in ("id", "name") if row.get(field)]
    return " or ".join(difflib.get_close_matches(reference, dict.fromkeys(names), n=2, cutoff=0.5))
