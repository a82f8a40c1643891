"""What commands print: tables for people, JSON, YAML and names for programs.

Data goes to stdout and nothing else does. A table is drawn with rich on a terminal; into a pipe it goes as
plain aligned text, uncoloured and never folded. A column says how a row's cell is made, once for both.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from keepstep.core.errors import InputError

Json = dict[str, Any]
FORMATS = ("table", "wide", "json", "yaml", "name")

_STYLES = {
    "running": "green", "succeeded": "green", "ready": "green", "recovered": "green", "finished": "green",
    "queued": "cyan", "starting": "cyan", "preparing": "cyan", "waiting": "cyan", "suspended": "cyan",
    "recovering": "yellow", "suspending": "yellow", "cancelling": "yellow", "silent": "yellow",
    "open": "yellow", "failed": "red", "lost": "red", "exited": "red", "cancelled": "dim", "gone": "dim",
    "closed": "dim",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    cell: Callable[[Json], str]
    wide: bool = False  # shown with -o wide only
    right: bool = False
    state: bool = False  # coloured by its word


def check_format(output: str) -> str:
    """An -o option's value, or an error that says what there is."""
    if output in FORMATS:
        return output
    import difflib

    near = difflib.get_close_matches(output, FORMATS, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise InputError(f"-o {output}: there is no such output", next=f"{hint}There are: {', '.join(FORMATS)}.")


def emit(
    output: str,
    data: Any,
    *,
    name: Callable[[], Iterable[str]],
    table: Callable[[bool], None],
) -> None:
    """Print `data` as asked for; `name` and `table(wide)` are made only when they are needed."""
    match check_format(output):
        case "json":
            print(json.dumps(data, indent=2))
        case "yaml":
            import yaml

            print(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), end="")
        case "name":
            print("".join(f"{line}\n" for line in name()), end="")
        case kind:
            table(kind == "wide")


def draw(rows: Sequence[Json], columns: Sequence[Column], *, wide: bool = False, empty: str = "") -> None:
    """A table on stdout; `empty` goes to stderr when there is nothing to show."""
    shown = [column for column in columns if wide or not column.wide]
    if not rows and empty:
        print(empty, file=sys.stderr)
        return
    cells = [[column.cell(row) for column in shown] for row in rows]
    if sys.stdout.isatty():
        _draw_rich(shown, cells)
    else:
        print("\n".join(_plain(shown, cells)))


def draw_pairs(pairs: Iterable[tuple[str, str]], *, indent: str = "") -> None:
    """`name  value` lines; empty values are left out, further lines of a value are indented under it."""
    kept = [(title, value) for title, value in pairs if value]
    width = max((len(title) for title, _ in kept), default=0)
    for title, value in kept:
        first, *rest = value.splitlines()
        print(f"{indent}{bold(title)}{' ' * (width - len(title))}  {first}")
        for line in rest:
            print(f"{indent}{' ' * width}  {line}")


def heading(text: str) -> None:
    print(f"\n{bold(text)}")


def colourful(stream: Any = None) -> bool:
    stream = stream or sys.stdout
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colourful() else text


def _plain(columns: Sequence[Column], cells: list[list[str]]) -> list[str]:
    lines = [[column.title for column in columns], *cells]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]


def _draw_rich(columns: Sequence[Column], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for line in cells:
        table.add_row(
            *(
                Text(cell, style=_STYLES.get(cell.partition(" ")[0], "") if column.state else "")
                for cell, column in zip(line, columns, strict=True)
            )
        )
    Console(highlight=False).print(table)
