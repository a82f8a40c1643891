"""keepstep bundle: what submit ships."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from keepstep.cli import units
from keepstep.core.errors import InputError

app = typer.Typer(rich_markup_mode=None)


@app.command("bundle")
def bundle(
    folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="The working folder.")] = ".",
    target: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Also write the archive.")
    ] = "",
) -> None:
    """Pack a working folder as submit would, and print the archive's sha256."""
    from keepstep.spec.bundle import pack

    path = Path(folder)
    if not path.is_dir():
        raise InputError("there is no such folder", where=folder)
    packed = pack(path.absolute())
    for warning in packed.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if target:
        Path(target).write_bytes(packed.data)
    print(f"{packed.files} files, {units.size(len(packed.data))}", file=sys.stderr)
    print(packed.sha256)
