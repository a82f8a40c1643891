"""keepstep demo: the whole promise in two minutes, on this machine, with nothing made up.

    stage    a home, a controller and three nodes of its own, and their end
    faults   how a rank is killed in a given phase, and how a node is lost
    story    the job that is disturbed, the one that is not, and what is said about them
    figures  what comes out of it, as numbers

Everything goes through the API that everybody has; only the faults reach past it, as faults do.
"""

import json
import sys
from typing import Annotated

import typer

from keepstep.core.errors import InputError

app = typer.Typer(rich_markup_mode=None)


@app.command("demo")
def demo(
    steps: Annotated[int, typer.Option("--steps", help="Of each of the two jobs; at least 40.")] = 80,
    keep: Annotated[bool, typer.Option("--keep", help="Stay up afterwards, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Eight ranks on three nodes of this machine: two are killed, a node is lost, the loss curve is the same.

    Exit code 1 if a recovery failed or the curve differs from an undisturbed run's.
    """
    from keepstep.cli.demo.stage import Stage
    from keepstep.cli.demo.story import tell

    if steps < 40:
        raise InputError(f"{steps} steps are too few", where="--steps", next="Three faults need 40 or more.")
    with Stage.up() as stage:
        figures = tell(stage, steps=steps)
        if keep:
            stage.keep()
    if as_json:
        print(json.dumps({"bench": "demo", "figures": figures.to_dict(), "context": {}}))
    if not figures.good:
        print(f"error: {figures.verdict}", file=sys.stderr)
        raise typer.Exit(1)
