"""keepstep top: jobs and nodes at a glance."""

from typing import Annotated

import typer

from keepstep.cli import jobs, nodes, units
from keepstep.cli.context import connect
from keepstep.cli.render import bold, draw
from keepstep.cli.watch import repeat

app = typer.Typer(rich_markup_mode=None)


@app.command("top")
def top(
    ctx: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
    every: Annotated[float, typer.Option("--every", help="Seconds between two looks.")] = 1.0,
) -> None:
    """Jobs, where their time goes, and nodes at a glance, live; Ctrl-C ends it."""
    client = connect(ctx)

    def show() -> None:
        info, fleet = client.get("/info"), client.get("/nodes")["nodes"]
        alive = [job for job in client.get("/jobs", limit=100)["jobs"] if job["state"] not in jobs.ENDED]
        ready = sum(node["state"] == "ready" for node in fleet)
        print(
            f"{bold('keepstep')} {info.get('version')}  {client.url}  "
            f"up {units.seconds(info.get('uptime_s'))}  "
            f"{ready} of {len(fleet)} nodes ready  {len(alive)} jobs"
        )
        print()
        draw(alive[:20], jobs.columns(alive[:20]))
        print()
        if stepping := [job for job in alive[:20] if (job.get("progress") or {}).get("time")]:
            draw(stepping, jobs.TIME_COLUMNS)
            print()
        troubled = sorted(fleet, key=lambda node: node["state"] == "ready")
        draw(troubled[:20], nodes.COLUMNS)

    repeat(show, watch=not once, every_s=max(0.2, every))
