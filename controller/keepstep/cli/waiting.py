"""keepstep wait: until a job is where it is wanted, can no longer come there, or the time is over."""

import time
from collections.abc import Callable
from typing import Annotated

import typer

from keepstep.cli.client import Client, Json, ref
from keepstep.cli.context import connect
from keepstep.cli.options import JobRef, Output, Timeout, duration_s, suggesting
from keepstep.cli.render import emit
from keepstep.core.clock import SystemClock
from keepstep.core.errors import InputError, JobFailed, TimedOut, Unreachable
from keepstep.core.states import JOB, JobState

app = typer.Typer(rich_markup_mode=None)

GOALS = ("recovered", "finished", *(str(state) for state in JobState))
_FINAL = frozenset(str(state) for state in JOB.final)
_EVERY_S = (0.1, 1.0)  # between two looks: at first, and later


@app.command("wait")
def wait(
    ctx: typer.Context,
    *,
    job: JobRef = "@last",
    goal: Annotated[
        str, typer.Option("--for", metavar="STATE", help=f"One of: {', '.join(GOALS)}.")
    ] = "finished",
    after: Annotated[
        int, typer.Option("--after", help="With --for recovered: of an incident later than this one.")
    ] = 0,
    timeout: Timeout = "24h",
    output: Output = "name",
) -> None:
    """Wait until a job runs, has recovered, has ended ...

    Exit code 0 when it came there, 7 when it ended and cannot come there any more, 6 when the time is over.
    `recovered`: an incident has happened (later than --after) and none is open any more.
    """
    if goal not in GOALS:
        import difflib

        near = difflib.get_close_matches(goal, GOALS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise InputError(f"--for {goal}: nothing to wait for", next=f"{hint}There are: {', '.join(GOALS)}.")
    client = connect(ctx)
    with suggesting(client, job):
        found = client.get(f"/jobs/{ref(job)}")
    found = wait_for(client, found["id"], goal, after=after, within_s=duration_s(timeout, "--timeout"))
    emit(
        output, found, name=lambda: [str(found["id"])], table=lambda wide: print(found["id"], found["state"])
    )


def wait_for(
    client: Client,
    job: str,
    goal: str,
    *,
    within_s: float,
    after: int = 0,
    look: Callable[[Json], None] = lambda job: None,
) -> Json:
    """Look until the goal is reached; `look` sees every answer.

    Errors: TimedOut, JobFailed. A controller that is away for a while is waited for, within the time.
    """
    clock = SystemClock()
    deadline = clock.monotonic() + within_s
    pause_s, state = _EVERY_S[0], "unknown"
    while True:
        try:
            found = client.get(f"/jobs/{ref(job)}")
            look(found)
            state = found["state"]
            if _reached(client, found, goal, after):
                return found
            if state in _FINAL:
                raise failed(found, goal)
        except Unreachable:
            if clock.monotonic() + pause_s > deadline:
                raise
        if clock.monotonic() + pause_s > deadline:
            raise TimedOut(
                f"{job} is {state}, not {goal}, after {within_s:g} s",
                next=f"`keepstep describe {job}` says what it waits for.",
            )
        time.sleep(pause_s)
        pause_s = min(_EVERY_S[1], pause_s * 1.3)


def failed(job: Json, goal: str = "succeeded") -> JobFailed:
    """The error for a job that has ended and can no longer come where it was wanted."""
    if job["state"] == "succeeded":
        return JobFailed(f"{job['id']} has succeeded, so it can no longer be {goal}")
    code = "" if job.get("exit_code") is None else f" with exit code {job['exit_code']}"
    return JobFailed(
        f"{job['id']} {job['state']}{code}",
        why=str(job.get("reason") or ""),
        next=f"`keepstep logs {job['id']} --first-error` shows where it began.",
    )


def _reached(client: Client, job: Json, goal: str, after: int) -> bool:
    state = job["state"]
    match goal:
        case "finished":
            return state in _FINAL
        case "recovered":
            if not job.get("incidents"):
                return False
            incidents = client.get(f"/jobs/{ref(job['id'])}/incidents")["incidents"]
            over = all(incident["state"] in ("recovered", "closed") for incident in incidents)
            recovered = any(i["state"] == "recovered" and i["id"] > after for i in incidents)
            return over and recovered and state in ("running", "succeeded")
        case "running":
            return state in ("running", "succeeded")  # it may be so fast that nobody saw it run
        case _:
            return bool(state == goal)
