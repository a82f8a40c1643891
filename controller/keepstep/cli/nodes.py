"""keepstep node: the machines that agents speak for."""

from typing import Annotated

import typer

from keepstep.cli import units
from keepstep.cli.client import Json, ref
from keepstep.cli.context import connect
from keepstep.cli.options import NodeRef, Output, Watch, Yes, confirm, suggesting
from keepstep.cli.render import Column, draw, draw_pairs, emit
from keepstep.cli.watch import repeat
from keepstep.core.clock import SystemClock

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="The machines that agents speak for.")

NodeReason = Annotated[str, typer.Option("--reason", help="Why; shown wherever the node is.")]


def _state(node: Json) -> str:
    return f"{node['state']}, cordoned" if node.get("cordoned") else str(node["state"])


def _jobs(node: Json) -> str:
    return ",".join(str(attempt["job"]) for attempt in node.get("attempts") or []) or "-"


def _slots(node: Json) -> str:
    return f"{node['slots']} busy" if node.get("busy") else str(node.get("slots", "-"))


def _seen(node: Json) -> str:
    if node.get("silence_s") is not None:
        return units.age(node["silence_s"])  # by the controller's own clock
    return units.age(SystemClock().wall() - node["last_seen"]) if node.get("last_seen") else "-"


def _labels(node: Json) -> str:
    return ",".join(f"{key}={value}" for key, value in (node.get("labels") or {}).items())


COLUMNS = (
    Column("NAME", lambda node: str(node["name"])),
    Column("STATE", _state, state=True),
    Column("SLOTS", _slots, right=True),
    Column("POOL", lambda node: str(node.get("pool") or "-")),
    Column("JOBS", _jobs),
    Column("HEARD", _seen, right=True),
    Column("REASON", lambda node: str(node.get("cordon_reason") or node.get("state_reason") or "")),
    Column("ROLE", lambda node: str(node.get("role") or "-"), wide=True),
    Column("ADDRESS", lambda node: ",".join(map(str, node.get("addresses") or [])) or "-", wide=True),
    Column("GPUS", lambda node: str(len(node.get("gpus") or [])), wide=True, right=True),
    Column("LABELS", _labels, wide=True),
)


@app.command("list")
def list_nodes(ctx: typer.Context, output: Output = "table", watch: Watch = False) -> None:
    """List nodes and what runs on them."""
    client = connect(ctx)

    def show() -> None:
        nodes = client.get("/nodes")["nodes"]
        emit(
            output,
            {"nodes": nodes},
            name=lambda: [str(node["name"]) for node in nodes],
            table=lambda wide: draw(
                nodes, COLUMNS, wide=wide, empty="no nodes; `keepstep up` starts some here"
            ),
        )

    repeat(show, watch=watch)


@app.command("describe")
def describe(ctx: typer.Context, node: NodeRef, output: Output = "table") -> None:
    """Everything that is known of a node."""
    client = connect(ctx)
    with suggesting(client, node, "/nodes", "nodes"):
        found = client.get(f"/nodes/{ref(node)}")

    def page(wide: bool) -> None:
        shown = [(column.title.lower(), column.cell(found)) for column in COLUMNS]
        known = {"name", "state", "slots", "pool", "role", "addresses", "gpus", "labels", "attempts"}
        rest = {
            key: value for key, value in found.items() if key not in known and value not in (None, "", [], {})
        }
        draw_pairs([*shown, *((key.replace("_", " "), _text(key, value)) for key, value in rest.items())])

    emit(output, found, name=lambda: [str(found["name"])], table=page)


@app.command("cordon")
def cordon(ctx: typer.Context, node: NodeRef, reason: NodeReason = "", output: Output = "name") -> None:
    """Place nothing new on a node. What runs there goes on."""
    _mark(ctx, "cordon", node, reason, output)


@app.command("uncordon")
def uncordon(ctx: typer.Context, node: NodeRef, reason: NodeReason = "", output: Output = "name") -> None:
    """Let a node be used again."""
    _mark(ctx, "uncordon", node, reason, output)


@app.command("confirm-lost")
def confirm_lost(
    ctx: typer.Context, *, node: NodeRef, reason: NodeReason = "", yes: Yes = False, output: Output = "name"
) -> None:
    """Say that a silent node is dead, so that its jobs need not wait for it.

    Only after you made sure that nothing runs on it: two attempts at once would write over each other.
    """
    confirm(f"Nothing of keepstep runs on {node} any more, and it will not come back by itself?", yes=yes)
    _mark(ctx, "confirm-lost", node, reason, output)


def _mark(ctx: typer.Context, verb: str, node: str, reason: str, output: str) -> None:
    client = connect(ctx)
    with suggesting(client, node, "/nodes", "nodes"):
        answer = client.post(f"/nodes/{ref(node)}/{verb}", {"reason": reason})
    emit(
        output,
        answer,
        name=lambda: [str(answer.get("name", node))],
        table=lambda wide: draw([answer], COLUMNS, wide=wide),
    )


def _text(key: str, value: object) -> str:
    if key in ("first_seen", "last_seen") and isinstance(value, int | float):
        return units.clock_time(value)
    if key.endswith("_bytes") and isinstance(value, int | float):
        return units.size(value)
    return str(value)
