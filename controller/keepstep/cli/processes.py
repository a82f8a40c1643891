"""keepstep controller and agent: the two programs themselves, in the foreground."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from keepstep.cli.rayed import RayAddress, RayDir, RayLabels, RayOptions, RayResource, RayUrl

app = typer.Typer(rich_markup_mode=None)


@app.command("controller")
def controller(
    *,
    home: Annotated[str, typer.Option("--home", help="State folder; else KEEPSTEP_HOME.")] = "",
    nodes: Annotated[int, typer.Option("--nodes", help="Local nodes to start.")] = 0,
    slots: Annotated[
        int, typer.Option("--slots", help="Ranks each local node can hold; 0: as the machine has.")
    ] = 0,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0: any that is free.")] = 0,
    idle_exit: Annotated[
        float,
        typer.Option("--idle-exit", help="End after so many seconds without jobs and clients; 0: never."),
    ] = 0.0,
    return_after: Annotated[
        float, typer.Option("--return-after", help="Seconds until a lost local node is started again.")
    ] = 30.0,
    health_policy: Annotated[
        str,
        typer.Option(
            "--health-policy", help="Policy on node health, over keepstep's own; SIGHUP reads it anew."
        ),
    ] = "",
    store: Annotated[
        str, typer.Option("--store", help="Database URL; else SQLite in the state folder.")
    ] = "",
    ray: RayAddress = "",
    ray_resource: RayResource = "GPU",
    ray_label: RayLabels = None,
    ray_dir: RayDir = "",
    ray_url: RayUrl = "",
) -> None:
    """Run the controller in the foreground until SIGTERM; `keepstep up` runs it in the background."""
    from keepstep.api.process import Settings, serve
    from keepstep.core.home import Home, find_home

    where = Home(path=Path(home).absolute()) if home else find_home()
    asked = RayOptions(
        address=ray, resource=ray_resource, labels=tuple(ray_label or ()), folder=ray_dir, url=ray_url
    )
    code = serve(
        Settings(
            home=where.make(),
            store_url=store or None,
            host=host,
            port=port,
            nodes=nodes,
            slots=slots,
            health_policy=Path(health_policy).absolute() if health_policy else None,
            idle_exit_s=idle_exit or None,
            return_after_s=return_after,
            ray=asked.settings if ray else None,
        )
    )
    raise typer.Exit(code)


@app.command(
    "agent",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def agent(ctx: typer.Context) -> None:
    """Run a node's agent in the foreground; its own options: keepstep agent --help."""
    from keepstep.agent.__main__ import main

    sys.exit(main(ctx.args))
