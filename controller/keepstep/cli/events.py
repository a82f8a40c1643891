"""keepstep events: the timeline of a job or of everything."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from keepstep.cli import units
from keepstep.cli.client import Client, Json, ref
from keepstep.cli.context import connect
from keepstep.cli.options import Watch, jobs_alive, suggesting
from keepstep.cli.render import Column, draw, emit
from keepstep.core.clock import SystemClock
from keepstep.core.errors import InputError, Unreachable

app = typer.Typer(rich_markup_mode=None)

_RECONNECT_S = 30.0
_ALL = 1 << 62  # as many as there are


def _where(event: Json) -> str:
    attempt = f"/{event['attempt']}" if event.get("attempt") else ""
    return f"{event['job']}{attempt}" if event.get("job") else str(event.get("node") or "-")


COLUMNS = (
    Column("TIME", lambda event: units.clock_time(event.get("at"))),
    Column("WHERE", _where),
    Column("KIND", lambda event: str(event["kind"])),
    Column("WHAT", lambda event: str(event.get("text") or "")),
    Column("ID", lambda event: str(event["id"]), wide=True, right=True),
    Column("NODE", lambda event: str(event.get("node") or ""), wide=True),
    Column("INCIDENT", lambda event: str(event.get("incident") or ""), wide=True),
    Column("BY", lambda event: str(event.get("principal") or ""), wide=True),
)


@app.command("events")
def events(
    ctx: typer.Context,
    *,
    job: Annotated[
        str, typer.Argument(metavar="[JOB]", help="Only this job's.", autocompletion=jobs_alive)
    ] = "",
    watch: Watch = False,
    after: Annotated[int, typer.Option("--after", help="Only events later than this one (its id).")] = 0,
    limit: Annotated[
        int, typer.Option("--limit", help="At most so many of the past, the newest ones.")
    ] = 200,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="table|wide|json|yaml|name", help="What to print.")
    ] = "table",
) -> None:
    """What happened, in order. With --watch also what happens from now on; -o json then prints one a line."""
    client = connect(ctx)
    job_id = ""
    if job:
        with suggesting(client, job):
            job_id = str(client.get(f"/jobs/{ref(job)}")["id"])
    if watch and output not in ("table", "wide", "json"):
        raise InputError(f"-o {output} cannot be watched", next="Take table, wide or json.")
    past = client.pages("/events", "events", limit=_ALL, after=after, job=job_id)[-limit:] if limit else []
    if not watch:
        emit(
            output,
            {"events": past},
            name=lambda: [str(event["id"]) for event in past],
            table=lambda wide: draw(past, COLUMNS, wide=wide, empty="no events"),
        )
        return
    newest = past[-1]["id"] if past else after
    for event in past:
        _print_event(event, output)
    for event in follow(client, after=newest, job=job_id):
        _print_event(event, output)


def follow(client: Client, *, after: int, job: str = "") -> Iterator[Json]:
    """Events as they come, for ever; a connection that breaks is made again from the last one seen.

    Errors: Unreachable when there is no controller for half a minute.
    """
    clock = SystemClock()
    lost_at: float | None = None
    while True:
        try:
            for event in client.events(after=after, job=job or None):
                lost_at = None
                after = event.id
                yield {"id": event.id, "kind": event.kind, **event.data}
        except Unreachable as error:
            if lost_at is None:
                lost_at = clock.monotonic()
                print(f"keepstep: {error.why or error.what}; connecting again", file=sys.stderr)
            elif clock.monotonic() - lost_at > _RECONNECT_S:
                raise
        time.sleep(0.5)


def _print_event(event: Json, output: str) -> None:
    if output == "json":
        print(json.dumps(event), flush=True)
        return
    head = f"{units.clock_time(event.get('at'))}  {_where(event)}  {event['kind']}"
    more = f"  [{event['id']}]" if output == "wide" else ""
    print(f"{head}: {event.get('text') or ''}{more}", flush=True)
