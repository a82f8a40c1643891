"""keepstep describe: everything about one job on one page."""

from typing import Any

import typer

from keepstep.cli import units
from keepstep.cli.client import Client, Json, ref
from keepstep.cli.context import connect
from keepstep.cli.jobs import summary
from keepstep.cli.options import JobRef, Output, suggesting
from keepstep.cli.render import Column, draw, draw_pairs, emit, heading

app = typer.Typer(rich_markup_mode=None)

_RECENT = 10  # decisions shown; -o json has more


def _cell(name: str, missing: str = "-") -> Any:
    return lambda row: missing if row.get(name) in (None, "") else str(row[name])


def _doing(rank: Json) -> str:
    if not rank.get("phase"):
        return "-"
    return f"{rank['phase']} {units.age(rank.get('phase_age_s'))}"


def _end(rank: Json) -> str:
    if rank.get("signal"):
        return f"signal {rank['signal']}"
    return "" if rank.get("exit_code") is None else f"exit {rank['exit_code']}"


def parent_of(attempt: Json) -> str:
    parent = attempt.get("parent")
    number, step = attempt.get("parent_attempt"), attempt.get("parent_step")
    if isinstance(parent, dict):
        number, step = parent.get("attempt"), parent.get("step")
    elif isinstance(parent, list | tuple):
        number, step = parent
    return f"attempt {number}, step {step}" if number else "nothing"


def culprit_of(incident: Json) -> str:
    culprit = incident.get("culprit") or {}
    rank = "" if culprit.get("rank") is None else f"rank {culprit['rank']}"
    role = f"({culprit['role']})" if culprit.get("role") else ""
    node = f"node {culprit['node']}" if culprit.get("node") else ""
    return " ".join(filter(None, (rank, role, node))) or "-"


RANKS = (
    Column("RANK", _cell("rank"), right=True),
    Column("ROLE", _cell("role")),
    Column("NODE", _cell("node")),
    Column("LOCAL", _cell("local_rank"), right=True),
    Column("PID", _cell("pid"), right=True),
    Column("STATE", _cell("state"), state=True),
    Column("STEP", lambda rank: "-" if rank.get("step") in (None, -1) else str(rank["step"]), right=True),
    Column("DOING", _doing),
    Column("ENDED", _end),
)

ATTEMPTS = (
    Column("ATTEMPT", _cell("number"), right=True),
    Column("STATE", _cell("state"), state=True),
    Column("RUNG", _cell("rung")),
    Column("FROM", parent_of),
    Column("NODES", lambda row: ",".join(row.get("nodes") or []) or "-"),
    Column("PLACED", lambda row: units.clock_time(row.get("placed_at"))),
    Column("FIRST STEP", lambda row: _after(row, "first_step_at"), right=True),
    Column("LASTED", lambda row: _after(row, "ended_at"), right=True),
    Column("OUTCOME", _cell("outcome")),
)

INCIDENTS = (
    Column("ID", _cell("id"), right=True),
    Column("VERDICT", _cell("verdict")),
    Column("STATE", _cell("state"), state=True),
    Column("ATTEMPT", _cell("attempt"), right=True),
    Column("CULPRIT", culprit_of),
    Column("WHEN", lambda row: units.clock_time(row.get("opened_at"))),
    Column("TRAINING AFTER", lambda row: _since(row, "opened_at", "recovered_at"), right=True),
    Column("WHAT", lambda row: str((row.get("evidence") or {}).get("what") or "")),
)

CHECKPOINTS = (
    Column("STEP", _cell("step"), right=True),
    Column("ATTEMPT", _cell("attempt"), right=True),
    Column("COMPLETE", lambda row: "yes" if row.get("complete") else "no"),
    Column("SEEN", lambda row: units.clock_time(row.get("seen_at"))),
)


def rejected_of(decision: Json) -> list[str]:
    return [f"{option['option']}: {option['why']}" for option in decision.get("rejected") or []]


@app.command("describe")
def describe(ctx: typer.Context, job: JobRef = "@last", output: Output = "table") -> None:
    """Everything about a job: ranks, who waits and why, attempts, incidents, checkpoints, decisions."""
    client = connect(ctx)
    with suggesting(client, job):
        found = gather(client, job)
    emit(output, found, name=lambda: [str(found["id"])], table=lambda wide: _page(found))


def gather(client: Client, job: str) -> Json:
    """The job with its lists, as -o json prints it."""
    detail = client.get(f"/jobs/{ref(job)}")
    path = f"/jobs/{ref(detail['id'])}"
    lists = {
        key: client.get(f"{path}/{key}").get(key, [])
        for key in ("ranks", "attempts", "incidents", "decisions")
    }
    lists["checkpoints"] = detail.get("checkpoints") or []
    return {**detail, **lists}


def _page(job: Json) -> None:
    moments = {"created": "created_at", "started": "started_at", "finished": "finished_at"}
    more = [(title, units.clock_time(job[key])) for title, key in moments.items() if job.get(key)]
    given = " ".join(f"{key} {job[key]}" for key in ("project", "queue", "priority", "pool") if job.get(key))
    owner = f"by {job['principal']}" if job.get("principal") else ""
    draw_pairs(
        [
            *summary({**job, "incidents": [incident["id"] for incident in job["incidents"]]}),
            ("queue", f"{given} {owner}".strip()),
            *more,
        ]
    )
    if waits := job.get("waiting_for"):
        draw_pairs([("waits for", str(waits))])
    for title, key, columns in (
        ("Ranks", "ranks", RANKS),
        ("Attempts", "attempts", ATTEMPTS),
        ("Incidents", "incidents", INCIDENTS),
        ("Checkpoints", "checkpoints", CHECKPOINTS),
    ):
        if job[key]:
            heading(title)
            draw(job[key], columns)
    if job["decisions"]:
        heading("Decisions, newest first")
        for decision in job["decisions"][:_RECENT]:
            print(f"{units.clock_time(decision.get('at'))}  {decision.get('kind')}: {decision.get('reason')}")
            for line in rejected_of(decision):
                print(f"          rejected {line}")


def _after(attempt: Json, key: str) -> str:
    return _since(attempt, "placed_at", key)


def _since(row: Json, begin: str, end: str) -> str:
    # Both moments are the controller's own, so their difference means something.
    return units.seconds(row[end] - row[begin]) if row.get(begin) and row.get(end) else "-"
