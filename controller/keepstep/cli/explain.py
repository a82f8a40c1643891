"""keepstep explain: one incident on one screen, for somebody who was woken by it."""

from typing import Annotated, Any

import typer

from keepstep.cli import units
from keepstep.cli.client import Client, Json, ref
from keepstep.cli.context import connect
from keepstep.cli.describe import culprit_of, rejected_of
from keepstep.cli.options import Output, incidents_alive
from keepstep.cli.render import draw_pairs, emit
from keepstep.core.errors import NotFound

app = typer.Typer(rich_markup_mode=None)


@app.command("explain")
def explain(
    ctx: typer.Context,
    incident: Annotated[
        str, typer.Argument(metavar="INCIDENT", help="Its number, or @last.", autocompletion=incidents_alive)
    ] = "@last",
    output: Output = "table",
) -> None:
    """One incident: what happened, how it was noticed, what was decided and why, what it cost, what to do."""
    client = connect(ctx)
    found = client.get(f"/incidents/{ref(newest(client) if incident == '@last' else incident)}")
    emit(
        output,
        found,
        name=lambda: [str(found["id"])],
        table=lambda wide: draw_pairs(explained(found), indent=""),
    )


def newest(client: Client) -> str:
    incidents = client.get("/incidents", limit=1)["incidents"]
    if not incidents:
        raise NotFound("there is no incident", why="nothing has gone wrong yet")
    return str(incidents[0]["id"])


def explained(incident: Json) -> list[tuple[str, str]]:
    """The screen, as pairs in reading order."""
    evidence, costs = incident.get("evidence") or {}, incident.get("costs") or {}
    before = incident.get("same_before") or []
    return [
        ("incident", f"{incident['id']}  {incident.get('verdict', '')}, {incident.get('state', '')}"),
        ("what", str(evidence.get("what") or incident.get("what") or "")),
        ("who", culprit_of(incident)),
        ("job", _job(incident)),
        ("when", units.clock_time(incident.get("opened_at"))),
        ("noticed", _noticed(evidence)),
        ("evidence", "\n".join(str(line) for line in evidence.get("lines") or [])),
        ("blame", _blame(evidence)),
        ("decided", _decided(incident)),
        ("rejected", "\n".join(rejected_of(_decision(incident)))),
        ("done", "\n".join(timeline(incident))),
        ("cost", _cost(costs)),
        ("before", f"the same in incident {', '.join(map(str, before))}" if before else "not seen before"),
        ("do now", str(incident.get("next") or advice(incident))),
    ]


def timeline(incident: Json) -> list[str]:
    """What was done, each line with its time since the failure, by the controller's clock."""
    began = _began(incident)
    events = incident.get("timeline") or []
    if events and began is not None:
        return [
            f"+{units.seconds(event['at'] - began)}  {event['kind']}: {event.get('text') or ''}"
            for event in events
        ]
    return [
        f"{name} after {units.seconds(value)}"
        for name, value in delays(incident).items()
        if value is not None
    ]


def delays(incident: Json) -> dict[str, float | None]:
    """Seconds from the failure to its detection, the decision and the first new step."""
    told = incident.get("seconds") or {}
    return {
        "detected": told.get("detected"),
        "decided": told.get("decided"),
        "training": told.get("recovered"),
    }


def advice(incident: Json) -> str:
    """What a person should do, where the controller does not say it."""
    evidence, job = incident.get("evidence") or {}, incident.get("job") or "JOB"
    match incident.get("state"):
        case "recovered":
            if incident.get("same_before"):
                return "look at the node: it is not the first time"
            return "nothing"
        case "waiting":
            return f"`keepstep describe {job}` says what it waits for"
        case "closed" if evidence.get("blame") == "job":
            return f"`keepstep logs {job} --first-error`, correct the job, submit it again"
        case "closed":
            return "nothing: the job is over"
        case _:
            return "wait: recovery is under way"


def _decision(incident: Json) -> Json:
    decision: Any = incident.get("decision")
    return decision if isinstance(decision, dict) else {}


def _decided(incident: Json) -> str:
    decision = _decision(incident)
    return str(decision.get("reason") or "")


def _job(incident: Json) -> str:
    attempt = f", attempt {incident['attempt']}" if incident.get("attempt") else ""
    step = (incident.get("evidence") or {}).get("step", -1)
    return (
        f"{incident['job']}{attempt}{f', after step {step}' if step >= 0 else ''}"
        if incident.get("job")
        else ""
    )


def _noticed(evidence: Json) -> str:
    if evidence.get("noticed"):
        return str(evidence["noticed"])
    began = evidence.get("began_s")
    return f"{units.seconds(began)} after it happened" if began is not None else ""


def _blame(evidence: Json) -> str:
    match evidence.get("blame"):
        case "job":
            return "the job: counts against its restarts"
        case "infrastructure":
            return "the infrastructure: does not count against the job's restarts"
        case other:
            return str(other or "")


def _cost(costs: Json) -> str:
    parts = [
        f"{name.removesuffix('_s').replace('_', ' ')} {units.seconds(value)}"
        for name, value in costs.items()
        if name.endswith("_s") and isinstance(value, int | float)
    ]
    rest = [f"{name.replace('_', ' ')} {value}" for name, value in costs.items() if not name.endswith("_s")]
    return ", ".join(parts + rest)


def _began(incident: Json) -> float | None:
    began: float | None = incident.get("began_at")
    return began
