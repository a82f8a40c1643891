"""keepstep context: controllers by name."""

import sys
from dataclasses import replace
from typing import Annotated

import typer

from keepstep.cli.context import LOCAL, Context, chosen, contexts_file, load_contexts, save_contexts
from keepstep.cli.options import Output
from keepstep.cli.render import Column, draw, emit
from keepstep.core.errors import InputError
from keepstep.core.home import find_home, running_controller

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Controllers by name: list, use, add.")


def _names(ctx: typer.Context, args: list[str], incomplete: str) -> list[str]:
    known = [LOCAL, *(context.name for context in load_contexts(contexts_file()).known)]
    return [name for name in known if name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(metavar="NAME", autocompletion=_names)]

COLUMNS = (
    Column("", lambda row: "*" if row["current"] else ""),
    Column("NAME", lambda row: str(row["name"])),
    Column("URL", lambda row: str(row["url"])),
)


@app.command("list")
def list_contexts(ctx: typer.Context, output: Output = "table") -> None:
    """List the controllers that are known; * marks the one that commands talk to."""
    running = running_controller(find_home())
    current = chosen((ctx.find_root().obj or {}).get("context", ""))
    local = {"name": LOCAL, "url": running.url if running else "(not running)", "current": current is None}
    rows = [local]
    rows += [
        {"name": known.name, "url": known.url, "current": known == current}
        for known in load_contexts(contexts_file()).known
    ]
    if current is not None and not any(row["current"] for row in rows):
        rows.append({"name": current.name, "url": current.url, "current": True})
    emit(
        output,
        {"contexts": rows},
        name=lambda: [str(row["name"]) for row in rows],
        table=lambda wide: draw(rows, COLUMNS),
    )


@app.command("use")
def use(name: Name) -> None:
    """Let commands talk to this controller from now on; `local` is this machine's own."""
    path = contexts_file()
    contexts = load_contexts(path)
    if name != LOCAL:
        contexts.find(name)
    save_contexts(path, replace(contexts, current="" if name == LOCAL else name))
    print(f"commands now talk to {name}", file=sys.stderr)


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    url: Annotated[str, typer.Argument(metavar="URL", help="http://host:port or https://host.")],
    token: Annotated[str, typer.Option("--token", help="Its token; - reads it from standard input.")] = "",
    use_it: Annotated[bool, typer.Option("--use", help="Also let commands talk to it from now on.")] = False,
) -> None:
    """Remember a controller by name."""
    if name == LOCAL or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise InputError(f"{name!r} cannot be a context's name", next="Take letters, digits, - _ and .")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url!r} is no address", where="URL", next="It looks like http://host:port.")
    secret = sys.stdin.readline().strip() if token == "-" else token  # noqa: S105 - a dash
    path = contexts_file()
    contexts = load_contexts(path).with_context(Context(name=name, url=url.rstrip("/"), token=secret))
    save_contexts(path, replace(contexts, current=name) if use_it else contexts)
    print(f"{name} is {url}; `keepstep context use {name}` makes it the one to talk to", file=sys.stderr)
