"""keepstep up and down: the controller of this machine."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from keepstep.cli import service
from keepstep.cli.options import Output, Yes, confirm
from keepstep.cli.rayed import RayAddress, RayDir, RayLabels, RayOptions, RayResource, RayUrl
from keepstep.cli.render import emit
from keepstep.core.errors import InputError
from keepstep.core.home import find_home
from keepstep.spec.rules import load_rules

app = typer.Typer(rich_markup_mode=None)


@app.command("up")
def up(
    *,
    nodes: Annotated[int, typer.Option("--nodes", help="Local nodes, each with an agent.")] = 1,
    slots: Annotated[
        int, typer.Option("--slots", help="Ranks a node can hold; 0: its GPUs, else processors.")
    ] = 0,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0: any that is free.")] = 0,
    health_policy: Annotated[
        str, typer.Option("--health-policy", help="Policy on node health, over keepstep's own.")
    ] = "",
    ray: RayAddress = "",
    ray_resource: RayResource = "GPU",
    ray_label: RayLabels = None,
    ray_dir: RayDir = "",
    ray_url: RayUrl = "",
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds until it must answer.")] = 60.0,
    output: Output = "name",
) -> None:
    """Start a controller with local nodes on this machine. Does nothing if one runs."""
    for value, option, least, most in (
        (nodes, "--nodes", 0, 1000),
        (slots, "--slots", 0, 1024),
        (port, "--port", 0, 65535),
    ):
        if not least <= value <= most:
            raise InputError(f"{value} is not within {least} and {most}", where=option)
    home = find_home()
    policy = str(Path(health_policy).absolute()) if health_policy else ""
    if policy:
        load_rules(Path(policy))  # says what is wrong with it before anything is started
    asked = RayOptions(
        address=ray, resource=ray_resource, labels=tuple(ray_label or ()), folder=ray_dir, url=ray_url
    )
    asked.check()
    options = service.Options(nodes=nodes, slots=slots, host=host, port=port, health_policy=policy, ray=asked)
    started = service.start(home, options, within_s=timeout)
    running = started.running
    if started.fresh:
        text = f"controller up (pid {running.pid}), state in {home.path}"
    else:
        text = f"a controller runs already (pid {running.pid}); its nodes and port stay as they are"
    print(text, file=sys.stderr)
    shown = {
        "url": running.url,
        "pid": running.pid,
        "term": running.term,
        "home": str(home.path),
        "fresh": started.fresh,
    }
    emit(output, shown, name=lambda: [running.url], table=lambda wide: print(running.url))


@app.command("down")
def down(
    force: Annotated[bool, typer.Option("--force", help="Even while jobs run; they are ended.")] = False,
    yes: Yes = False,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds until it must be gone.")] = 60.0,
) -> None:
    """Stop the controller of this machine and its local nodes. Refused while jobs run, unless --force."""
    home = find_home()
    if force and service.find(home) is not None:
        confirm("End the controller and every job that runs on this machine's nodes?", yes=yes)
    stopped = service.stop(home, force=force, within_s=timeout)
    print(
        f"stopped (pid {stopped.pid})" if stopped else "no controller runs on this machine", file=sys.stderr
    )
