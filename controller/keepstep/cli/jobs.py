"""keepstep list and status: jobs as rows, and one job in short."""

import functools
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from keepstep.cli import units
from keepstep.cli.client import Json, ref
from keepstep.cli.context import connect
from keepstep.cli.options import JobRef, Output, Watch, suggesting
from keepstep.cli.render import Column, draw, draw_pairs, emit
from keepstep.cli.watch import repeat
from keepstep.core.clock import SystemClock
from keepstep.core.errors import InputError
from keepstep.core.states import JobState

app = typer.Typer(rich_markup_mode=None)

ENDED = ("succeeded", "failed", "cancelled")


def step_of(job: Json) -> str:
    progress = job.get("progress") or {}
    if progress.get("step") is None or progress["step"] < 0:
        return "-"
    return f"{progress['step']}/{progress['steps']}" if progress.get("steps") else str(progress["step"])


def age_of(job: Json) -> str:
    end = job.get("finished_at") or SystemClock().wall()
    return units.age(end - job["created_at"]) if job.get("created_at") else "-"


def layout_of(job: Json) -> str:
    layout = job.get("layout") or {}
    return (
        " ".join(f"{axis}{layout[axis]}" for axis in ("tp", "cp", "pp", "dp") if layout.get(axis, 1) > 1)
        or "-"
    )


def _progress(job: Json, name: str) -> Any:
    return (job.get("progress") or {}).get(name)


def _share(part: str, job: Json) -> str:
    share = (_progress(job, "time") or {}).get(part)
    return "-" if share is None else f"{share:.0%}"


def _gb(job: Json) -> str:
    total = (job.get("rank_memory") or {}).get("total")
    return "-" if total is None else f"{total / 1e9:.3g}"


COLUMNS = (
    Column("ID", lambda job: str(job["id"])),
    Column("STATE", lambda job: str(job["state"]), state=True),
    Column("STEP", step_of, right=True),
    Column("LOSS", lambda job: units.figure(_progress(job, "loss")), right=True),
    Column("TOKENS/S", lambda job: units.count(_progress(job, "tokens_per_s")), right=True),
    Column("ATTEMPT", lambda job: str((job.get("attempt") or {}).get("number", "-")), right=True),
    Column("RANKS", lambda job: str(job.get("world_size", "-")), right=True),
    Column("GB/RANK", _gb, right=True),
    Column("AGE", age_of, right=True),
    Column("LAYOUT", layout_of, wide=True),
    Column("POOL", lambda job: str(job.get("pool", "-")), wide=True),
    Column("QUEUE", lambda job: str(job.get("queue", "-")), wide=True),
    Column("PRIO", lambda job: str(job.get("priority", "-")), wide=True, right=True),
    Column("NODES", lambda job: ",".join((job.get("attempt") or {}).get("nodes") or []) or "-", wide=True),
    Column("OWNER", lambda job: str(job.get("principal") or "-"), wide=True),
    Column("REASON", lambda job: str(job.get("waiting_for") or job.get("reason") or ""), wide=True),
)

_VALIDATION = Column(
    "VALIDATION", lambda job: units.figure((_progress(job, "validation") or {}).get("loss")), right=True
)


def columns(jobs: Sequence[Json]) -> tuple[Column, ...]:
    """With the loss on text that is not trained on, where any of the jobs has one."""
    if not any(_progress(job, "validation") for job in jobs):
        return COLUMNS
    at = 1 + next(k for k, column in enumerate(COLUMNS) if column.title == "LOSS")
    return (*COLUMNS[:at], _VALIDATION, *COLUMNS[at:])


# Of the time in steps.
TIME_COLUMNS = (
    Column("ID", lambda job: str(job["id"])),
    *(
        Column(part.upper(), functools.partial(_share, part), right=True)
        for part in ("data", "forward", "backward", "optimizer", "communication", "bubble")
    ),
)


@app.command("list")
def list_jobs(
    ctx: typer.Context,
    *,
    state: Annotated[str, typer.Option("--state", help="Only these states, comma separated.")] = "",
    name: Annotated[str, typer.Option("--name", help="Only jobs of this name.")] = "",
    limit: Annotated[int, typer.Option("--limit", help="At most so many.")] = 50,
    output: Output = "table",
    watch: Watch = False,
) -> None:
    """List jobs, newest first."""
    states = states_of(state)
    client = connect(ctx)

    def show() -> None:
        jobs = client.pages("/jobs", "jobs", limit=limit, state=states, name=name)
        emit(
            output,
            {"jobs": jobs},
            name=lambda: [str(job["id"]) for job in jobs],
            table=lambda wide: draw(
                jobs, columns(jobs), wide=wide, empty="no jobs; `keepstep submit` makes one"
            ),
        )

    repeat(show, watch=watch)


@app.command("status")
def status(
    ctx: typer.Context, *, job: JobRef = "@last", output: Output = "table", watch: Watch = False
) -> None:
    """Where a job is: state, step, loss, speed. The JSON form is stable."""
    client = connect(ctx)

    def show() -> None:
        with suggesting(client, job):
            found = client.get(f"/jobs/{ref(job)}")
        emit(output, found, name=lambda: [str(found["id"])], table=lambda wide: draw_pairs(summary(found)))

    repeat(show, watch=watch)


def summary(job: Json) -> list[tuple[str, str]]:
    """What `status` shows, as pairs."""
    attempt, progress = job.get("attempt") or {}, job.get("progress") or {}
    restarts = job.get("restarts") or {}
    speed = [
        f"{units.count(progress['tokens_per_s'])} tokens/s" if progress.get("tokens_per_s") else "",
        f"{progress['tflops']:.3g} TFLOP/s a slot" if progress.get("tflops") else "",
        f"MFU {100 * progress['mfu']:.1f} %" if progress.get("mfu") else "",
    ]
    step = f"step {step_of(job)}" if step_of(job) != "-" else ""
    loss = f"loss {units.figure(progress['loss'])}" if progress.get("loss") is not None else ""
    where = f"on {', '.join(attempt['nodes'])}" if attempt.get("nodes") else ""
    rung = f"({attempt['rung']})" if attempt.get("rung") else ""
    saved = progress.get("checkpoint_step")
    allowed = f"of {restarts['max']} " if restarts.get("max") is not None else ""
    return [
        ("job", str(job["id"])),
        ("state", " ".join(filter(None, (str(job["state"]), _why(job))))),
        ("progress", "  ".join(filter(None, (step, loss, *speed)))),
        ("validation", _validation(progress.get("validation") or {})),
        ("time", _time(progress.get("time") or {})),
        ("checkpoint", f"step {saved}" if saved is not None and saved >= 0 else ""),
        ("memory", _memory(job.get("memory") or {})),
        ("of a rank", _of_a_rank(job.get("rank_memory") or {})),
        ("layout", f"{layout_of(job)}  ({job.get('world_size')} ranks)"),
        ("attempt", " ".join(filter(None, (str(attempt.get("number", "")), rung, where)))),
        ("restarts", f"{restarts['used']} {allowed}used" if restarts.get("used") else ""),
        ("incidents", ", ".join(str(number) for number in job.get("incidents") or [])),
        ("exit code", "" if job.get("exit_code") is None else str(job["exit_code"])),
        ("age", age_of(job)),
    ]


def _time(time: Json) -> str:
    return ", ".join(f"{part} {share:.0%}" for part, share in time.items() if share)


def _validation(found: Json) -> str:
    """loss 2.931 at step 40 (code 2.104, web 3.758)"""
    if found.get("loss") is None:
        return ""
    parts = [f"{source} {units.figure(loss)}" for source, loss in found["by_source"].items()]
    each = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    return f"loss {units.figure(found['loss'])} at step {found['step']}{each}"


def _memory(memory: Json) -> str:
    """step 61, protected up to step 60 (46.1 MB)"""
    if memory.get("step") is None:
        return ""
    safe = memory["protected_step"]
    protected = f"protected up to step {safe}" if safe >= 0 else "not protected against the loss of a node"
    return f"step {memory['step']}, {protected} ({memory['bytes'] / 1e6:.1f} MB)"


def _of_a_rank(parts: Json) -> str:
    """at most 61.3 GB: weights 6.1, ..."""
    if not parts:
        return ""
    told = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items() if name != "total" and size)
    return f"at most {parts['total'] / 1e9:.3g} GB: {told}"


def _why(job: Json) -> str:
    told = job.get("waiting_for") or job.get("reason") or ""
    due = f" ({units.seconds(job['due_s'])} left)" if job.get("due_s") else ""
    return f"- {told}{due}" if told else ""


def states_of(text: str) -> list[str]:
    """Comma separated states. Errors: InputError for one that no job can have."""
    known = [str(state) for state in JobState]
    words = [part.strip() for part in text.split(",") if part.strip()]
    for word in words:
        if word not in known:
            import difflib

            near = difflib.get_close_matches(word, known, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise InputError(
                f"--state {word}: there is no such state", next=f"{hint}There are: {', '.join(known)}."
            )
    return words
