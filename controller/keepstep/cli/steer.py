"""keepstep cancel, suspend, resume, requeue."""

import sys
from typing import Annotated

import typer

from keepstep.cli import waiting
from keepstep.cli.client import ref
from keepstep.cli.context import connect
from keepstep.cli.options import JobRef, Output, Reason, Timeout, Yes, confirm, duration_s, suggesting
from keepstep.cli.render import emit

app = typer.Typer(rich_markup_mode=None)

Wait = Annotated[bool, typer.Option("--wait", help="Return when it is done.")]


@app.command("cancel")
def cancel(
    ctx: typer.Context, *, job: JobRef, reason: Reason = "", yes: Yes = False, wait: Wait = False,
    timeout: Timeout = "5m", output: Output = "table",
) -> None:  # fmt: skip
    """End a job for good. Its checkpoints stay."""
    _steer(ctx, "cancel", job, reason, yes=yes, question=True, until="finished" if wait else "",
           timeout=timeout, output=output)  # fmt: skip


@app.command("suspend")
def suspend(
    ctx: typer.Context, *, job: JobRef, reason: Reason = "", wait: Wait = False, timeout: Timeout = "5m",
    output: Output = "table",
) -> None:  # fmt: skip
    """Stop a job and free its nodes. It goes on from its newest checkpoint after resume."""
    _steer(ctx, "suspend", job, reason, until="suspended" if wait else "", timeout=timeout, output=output)


@app.command("resume")
def resume(
    ctx: typer.Context, *, job: JobRef, reason: Reason = "", wait: Wait = False, timeout: Timeout = "5m",
    output: Output = "table",
) -> None:  # fmt: skip
    """Let a suspended job go on."""
    _steer(ctx, "resume", job, reason, until="running" if wait else "", timeout=timeout, output=output)


@app.command("requeue")
def requeue(
    ctx: typer.Context, *, job: JobRef, reason: Reason = "", yes: Yes = False, wait: Wait = False,
    timeout: Timeout = "5m", output: Output = "table",
) -> None:  # fmt: skip
    """End a job's present attempt and queue it again; what came after its newest checkpoint is done again."""
    _steer(ctx, "requeue", job, reason, yes=yes, question=True, until="running" if wait else "",
           timeout=timeout, output=output)  # fmt: skip


def _steer(
    ctx: typer.Context, verb: str, job: str, reason: str, *, until: str, timeout: str, output: str,
    yes: bool = False, question: bool = False,
) -> None:  # fmt: skip
    within_s = duration_s(timeout, "--timeout")
    client = connect(ctx)
    with suggesting(client, job):
        found = client.get(f"/jobs/{ref(job)}")
    if question:
        confirm(f"{verb} {found['id']} ({found['state']})?", yes=yes)
    # By its id from here on: @last may mean another job by now.
    answer = client.post(f"/jobs/{ref(found['id'])}/{verb}", {"reason": reason})
    if until:
        answer = waiting.wait_for(client, found["id"], until, within_s=within_s)
    print(f"{found['id']}: {answer.get('state', verb)}", file=sys.stderr)
    emit(output, answer, name=lambda: [str(found["id"])], table=lambda wide: print(found["id"]))
