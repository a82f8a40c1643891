"""keepstep token: who may do what."""

import sys
from typing import Annotated

import typer

from keepstep.cli import units
from keepstep.cli.client import ref
from keepstep.cli.context import connect
from keepstep.cli.options import Output, Yes, confirm, duration_s
from keepstep.cli.render import Column, draw, emit
from keepstep.core.errors import InputError

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Access: create, list, revoke.")

ROLES = ("viewer", "submitter", "operator", "admin")
COLUMNS = (
    Column("ID", lambda token: str(token.get("id")), right=True),
    Column("NAME", lambda token: str(token.get("name"))),
    Column("KIND", lambda token: str(token.get("kind"))),
    Column("ROLE", lambda token: str(token.get("role") or "-")),
    Column("PROJECT", lambda token: str(token.get("project") or "-")),
    Column("NODE", lambda token: str(token.get("node") or "-"), wide=True),
    Column("MADE", lambda token: units.clock_time(token.get("created_at"))),
    Column("EXPIRES", lambda token: units.clock_time(token.get("expires_at"))),
    Column("LAST USED", lambda token: units.clock_time(token.get("last_used_at"))),
    Column("REVOKED", lambda token: units.clock_time(token.get("revoked_at")), wide=True),
)


@app.command("create")
def create(
    ctx: typer.Context,
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="For whom or what.")],
    role: Annotated[str, typer.Option("--role", help=f"One of: {', '.join(ROLES)}.")] = "submitter",
    join: Annotated[
        bool, typer.Option("--join", help="Lets an agent join as a node, instead of a person.")
    ] = False,
    project: Annotated[str, typer.Option("--project", help="Jobs of this project.")] = "default",
    expires: Annotated[str, typer.Option("--expires", help="After this long: 12h, 90d.")] = "",
    uses: Annotated[int, typer.Option("--uses", help="With --join: how many nodes; 0: any number.")] = 0,
    output: Output = "name",
) -> None:
    """Make a token and print its secret, this once."""
    if role not in ROLES:
        raise InputError(f"--role {role}: there is no such role", next=f"There are: {', '.join(ROLES)}.")
    client = connect(ctx)
    body = {
        "name": name, "join": join, "role": None if join else role, "project": project,
        "ttl_s": duration_s(expires, "--expires") if expires else None, "uses": uses or None,
    }  # fmt: skip
    issued = client.post("/tokens", body)
    print("Keep it: it is not shown again.", file=sys.stderr)
    emit(output, issued, name=lambda: [str(issued["secret"])], table=lambda wide: print(issued["secret"]))


@app.command("list")
def list_tokens(
    ctx: typer.Context,
    output: Output = "table",
) -> None:
    """List tokens, without their secrets."""
    tokens = connect(ctx).get("/tokens")["tokens"]
    emit(
        output,
        {"tokens": tokens},
        name=lambda: [str(token["id"]) for token in tokens],
        table=lambda wide: draw(tokens, COLUMNS, wide=wide, empty="no tokens"),
    )


@app.command("revoke")
def revoke(
    ctx: typer.Context,
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="Its id or name.")],
    yes: Yes = False,
) -> None:
    """Take a token back; whoever uses it is refused from now on."""
    confirm(f"Revoke token {token}?", yes=yes)
    connect(ctx).delete(f"/tokens/{ref(token)}")
    print(token)
