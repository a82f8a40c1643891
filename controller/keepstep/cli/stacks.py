"""keepstep stacks: where every rank of a job stands at this moment, the odd ones first."""

import typer

from keepstep.cli.client import Json, ref
from keepstep.cli.context import connect
from keepstep.cli.options import JobRef, Output, suggesting
from keepstep.cli.render import Column, draw, emit

app = typer.Typer(rich_markup_mode=None)

COLUMNS = (
    Column("RANK", lambda row: str(row["rank"]), right=True),
    Column("PROCESS", lambda row: str(row.get("process") or "-"), state=True),
    Column("KERNEL", lambda row: str(row.get("kernel") or "-")),
    Column("INTERPRETER", lambda row: str(row.get("interpreter") or "-")),
    Column("STANDS IN", lambda row: str((row.get("stack") or ["-"])[0])),
)


@app.command("stacks")
def stacks(ctx: typer.Context, *, job: JobRef = "@last", output: Output = "table") -> None:
    """Where every rank stands: stacks in groups, the odd ones first; processes and what they wait for."""
    client = connect(ctx)
    with suggesting(client, job):
        found = client.get(f"/jobs/{ref(job)}/stacks")
    emit(
        output,
        found,
        name=lambda: [str(row["rank"]) for row in found["ranks"]],
        table=lambda wide: show(found),
    )


def show(found: Json) -> None:
    draw(found["ranks"], COLUMNS, wide=True, empty="no rank could be looked at")
    for line in (*found["lines"], *found["errors"]):
        print(line)
