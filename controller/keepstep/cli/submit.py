"""keepstep submit: from a YAML file to an accepted job."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from keepstep.cli import waiting
from keepstep.cli.client import Client, ref
from keepstep.cli.context import connect
from keepstep.cli.options import Output, Timeout, duration_s
from keepstep.cli.render import draw_pairs, emit
from keepstep.core.errors import InputError, NotFound
from keepstep.core.job import CommandRun, JobSpec

app = typer.Typer(rich_markup_mode=None)


def _fields(ctx: typer.Context, args: list[str], incomplete: str) -> list[str]:
    from keepstep.spec import paths

    return [f"{path}=" for path in paths() if path.startswith(incomplete)]


@app.command("submit")
def submit(
    ctx: typer.Context,
    *,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The job's YAML file; - for standard input.")],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Change a field of the file.", autocompletion=_fields
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it and show where it would run.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when the job has ended; 7 if it failed.")
    ] = False,
    timeout: Timeout = "24h",
    output: Output = "name",
) -> None:
    """Submit a job from its YAML file. Prints its id."""
    from keepstep.spec import check, to_dict

    within_s = duration_s(timeout, "--timeout")
    checked = check(
        _read(file), "standard input" if file == "-" else file, changes or (), base_dir=_folder(file)
    )
    for warning in checked.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    client = connect(ctx)
    spec = checked.spec if dry_run else ship(client, checked.spec)
    body = {"spec": to_dict(spec), "source": {"file": file, "cwd": str(Path.cwd())}}
    if dry_run:
        preview = client.post("/jobs", body, dry_run=True)
        print(checked.summary, file=sys.stderr)
        emit(
            "table" if output == "name" else output,
            preview,
            name=list,
            table=lambda wide: draw_pairs([(key, _words(value)) for key, value in preview.items()]),
        )
        return
    job = client.post("/jobs", body)
    print(f"submitted {checked.summary}", file=sys.stderr)
    if wait:
        print(job["id"], file=sys.stderr)
        job = waiting.wait_for(client, job["id"], "finished", within_s=within_s)
    emit(output, job, name=lambda: [str(job["id"])], table=lambda wide: print(job["id"], job["state"]))
    if wait and job["state"] != "succeeded":
        raise waiting.failed(job)


def ship(client: Client, spec: JobSpec) -> JobSpec:
    """Send the working folder if the job wants it shipped; the controller may have it already."""
    run = spec.run
    if not isinstance(run, CommandRun) or run.ship != "bundle" or run.bundle is not None:
        return spec
    from keepstep.cli import units
    from keepstep.spec.bundle import pack

    folder = spec.checkpoint.dir
    bundle = pack(Path(run.workdir), checkpoint_dir=Path(folder) if folder and "://" not in folder else None)
    for warning in bundle.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not _known(client, bundle.sha256):
        client.put(f"/bundles/{ref(bundle.sha256)}", bundle.data)
        print(f"shipped {run.workdir}: {bundle.files} files, {units.size(len(bundle.data))}", file=sys.stderr)
    return replace(spec, run=replace(run, bundle=bundle.sha256))


def _known(client: Client, sha256: str) -> bool:
    try:
        client.head(f"/bundles/{ref(sha256)}")
    except NotFound:
        return False
    return True


def _read(file: str) -> Path | str:
    if file == "-":
        return sys.stdin.read()
    path = Path(file)
    if not path.is_file():
        near = (
            [str(found) for found in sorted(path.parent.glob("*.y*ml"))[:3]] if path.parent.is_dir() else []
        )
        raise InputError(
            "there is no such file",
            where=file,
            next=f"There is {', '.join(near)}." if near else "Give the path of a job's YAML file.",
        )
    return path


def _folder(file: str) -> Path:
    return Path.cwd() if file == "-" else Path(file).absolute().parent


def _words(value: object) -> str:
    match value:
        case list():
            return "\n".join(_words(item) for item in value)
        case dict():
            return "  ".join(f"{key} {_words(item)}" for key, item in value.items())
        case None:
            return ""
        case _:
            return str(value)
