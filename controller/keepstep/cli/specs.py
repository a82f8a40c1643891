"""keepstep spec: the job file."""

import json
from pathlib import Path
from typing import Annotated

import typer

from keepstep.cli.render import emit
from keepstep.core.errors import InputError

app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="The job file: schema, check, explain a field."
)


def _paths(ctx: typer.Context, args: list[str], incomplete: str) -> list[str]:
    from keepstep.spec import paths

    return [path for path in paths() if path.startswith(incomplete)]


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema, for editors."""
    from keepstep.spec import schema as schema_of

    print(json.dumps(schema_of(), indent=2))


@app.command("check")
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The job's YAML file.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="table|json|yaml", help="What to print.")
    ] = "table",
) -> None:
    """Check a job's file; -o yaml prints it with every default filled in."""
    import sys

    from keepstep.core.job import LlamaRun
    from keepstep.spec import check as check_of
    from keepstep.spec import rank_map, to_dict
    from keepstep.spec.memory import rank_memory

    path = Path(file)
    if not path.is_file():
        raise InputError("there is no such file", where=file, next="Give the path of a job's YAML file.")
    checked = check_of(path, None, changes or ())
    for warning in checked.warnings:
        print(f"warning: {warning}", file=sys.stderr)

    def page(wide: bool) -> None:
        print(checked.summary)
        if isinstance(run := checked.spec.run, LlamaRun):
            layout = checked.spec.parallelism
            print(f"on GPUs a rank takes at most {rank_memory(run, layout, replicas=layout.dp)}")
        if wide:
            print(rank_map(checked.spec))

    emit(output, to_dict(checked.spec), name=lambda: [checked.spec.name], table=page)


@app.command("explain")
def explain(
    field: Annotated[
        str, typer.Argument(metavar="[FIELD]", help="Like recovery.hang_after.", autocompletion=_paths)
    ] = "",
) -> None:
    """What a field means, its unit and its default."""
    from keepstep.spec import explain as explain_field

    print(explain_field(field))
