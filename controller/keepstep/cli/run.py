"""keepstep run: torchrun's place, on this machine, attached to this terminal."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from keepstep.core.errors import InputError

_FRUITLESS_MAX = 3  # attempts in a row that show no step and end within minutes

app = typer.Typer(rich_markup_mode=None)

# Accepted because torchrun does, and of no use here: one machine, a rendezvous of our own, logs kept anyway.
_IGNORED = (
    "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf", "--rdzv-timeout", "--master-addr",
    "--master-port", "--monitor-interval", "--start-method", "--role", "--log-dir", "--redirects", "--tee",
    "--local-addr", "--logs-specs", "--numa-binding", "--local-ranks-filter",
)  # fmt: skip


def _both(*names: str) -> list[str]:
    """Torchrun takes each option with dashes and with underscores."""
    underscored = [
        f"--{name[2:].replace('-', '_')}" for name in names if name.startswith("--") and "-" in name[2:]
    ]
    return [*names, *underscored]


@app.command("run", context_settings={"allow_interspersed_args": False})
def run(
    ctx: typer.Context,
    *,
    command: Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGS]...", help="What each rank runs.")],
    nproc: Annotated[
        str,
        typer.Option(*_both("--nproc", "--nproc-per-node"), help="Ranks: a number, auto, gpu or cpu."),
    ] = "1",
    nnodes: Annotated[
        str, typer.Option("--nnodes", help="1: this machine; `keepstep submit` takes more.")
    ] = "1",
    max_restarts: Annotated[
        int,
        typer.Option(*_both("--max-restarts"), help="After the script's own failures; after kills: always."),
    ] = 0,
    module: Annotated[
        bool, typer.Option("--module", "-m", help="SCRIPT is a module, as for python -m.")
    ] = False,
    no_python: Annotated[
        bool, typer.Option(*_both("--no-python"), help="SCRIPT is a program of its own.")
    ] = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="For the ranks.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Of the job; else the script's.")] = "",
    warm: Annotated[
        bool, typer.Option("--warm/--no-warm", help="Start ranks from a process that has torch loaded.")
    ] = True,
    grace: Annotated[float, typer.Option("--grace", help="Seconds for ranks to end after Ctrl-C.")] = 30.0,
    standalone: Annotated[bool, typer.Option("--standalone", hidden=True)] = False,
    ignored: Annotated[list[str] | None, typer.Option(*_both(*_IGNORED), "-r", "-t", hidden=True)] = None,
    node_rank: Annotated[str, typer.Option(*_both("--node-rank"), hidden=True)] = "0",
) -> None:
    """Run a script in torchrun's place: the same environment, torchrun's options, the script's own exit code.

    It starts an agent of its own on this machine, with this shell's folder, environment and limits. Ctrl-C
    goes to the ranks; a second one kills them. When this command ends, however it ends, its ranks end.
    """
    from keepstep.cli.context import connect
    from keepstep.cli.session import Session
    from keepstep.spec import command_spec

    if nnodes.split(":")[0] != "1" or node_rank != "0":
        raise InputError(
            "run is for this machine alone",
            where="--nnodes",
            next="`keepstep submit` runs jobs on several nodes.",
        )
    if ignored:
        print("keepstep: options about rendezvous and log files are not needed here", file=sys.stderr)
    ranks = nproc_of(nproc)
    spec = command_spec(
        name=name or name_of(command[0], module=module),
        command=command_of(command, module=module, no_python=no_python),
        nproc=ranks,
        workdir=Path.cwd(),
        env=env_of(env or []),
        pool="run",
        overrides=[
            # The script's own failures; kills from outside are recovered from, unless nothing comes of it.
            f"recovery.restarts.max={max_restarts}",
            f"recovery.no_progress_max={max(_FRUITLESS_MAX, max_restarts + 1)}",
            "run.stop.signal=INT",
            f"run.stop.grace={grace:g}s",
            f"run.warm={'auto' if warm else 'never'}",
        ],
    )
    raise typer.Exit(Session.of(connect(ctx), spec).run())


def command_of(words: list[str], *, module: bool, no_python: bool) -> list[str]:
    """What a rank executes. A script is given by itself, so that it may be started from a warm process."""
    if no_python and module:
        raise InputError("--no-python and --module exclude each other", where="keepstep run")
    first, *rest = words
    if no_python:
        return words
    if module:
        return [sys.executable, "-m", *words]
    if not Path(first).exists():
        near = (
            sorted(str(path) for path in Path(first).parent.glob("*.py"))[:5]
            if Path(first).parent.is_dir()
            else []
        )
        raise InputError(
            "there is no such script",
            where=first,
            next=f"There is {', '.join(near)}." if near else "-m runs a module, --no-python a program.",
        )
    return words if first.endswith(".py") else [sys.executable, first, *rest]


def nproc_of(text: str) -> int:
    """Ranks from torchrun's words for them."""
    gpus = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    match text:
        case "gpu":
            number = gpus
        case "cpu":
            number = os.cpu_count() or 1
        case "auto":
            number = gpus or os.cpu_count() or 1
        case _:
            number = int(text) if text.isdigit() else 0
    if not 1 <= number <= 1024:
        why = "this machine has no GPU" if text == "gpu" else ""
        raise InputError(f"{text!r} is no number of ranks", where="--nproc", why=why, next="Give 1 or more.")
    return number


def env_of(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", pair):
            raise InputError(f"{pair!r} is no NAME=VALUE", where="--env")
    return dict(pair.split("=", 1) for pair in pairs)


def name_of(script: str, *, module: bool) -> str:
    stem = script.rpartition(".")[2] if module else Path(script).stem
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") or "run"
