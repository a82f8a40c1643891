"""keepstep node: the machines that agents speak for."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from keepstep.cli import units
from keepstep.cli.client import Json, ref
from keepstep.cli.context import connect
from keepstep.cli.options import NodeRef, Output, Watch, Yes, confirm, duration_s, suggesting
from keepstep.cli.render import Column, draw, draw_pairs, emit
from keepstep.cli.watch import repeat
from keepstep.core.clock import SystemClock
from keepstep.core.errors import JobFailed
from keepstep.spec.rules import load_rules

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="The machines that agents speak for.")

NodeReason = Annotated[str, typer.Option("--reason", help="Why; shown wherever the node is.")]


def _state(node: Json) -> str:
    life = node.get("life", "healthy")
    return f"{node['state']}, {life}" if life != "healthy" else str(node["state"])


def _jobs(node: Json) -> str:
    return ",".join(str(attempt["job"]) for attempt in node.get("attempts") or []) or "-"


def _slots(node: Json) -> str:
    return f"{node['slots']} busy" if node.get("busy") else str(node.get("slots", "-"))


def _seen(node: Json) -> str:
    if node.get("silence_s") is not None:
        return units.age(node["silence_s"])  # by the controller's own clock
    return units.age(SystemClock().wall() - node["last_seen"]) if node.get("last_seen") else "-"


def _reason(node: Json) -> str:
    """Of the time out that it is in, else of its connection's state."""
    if node.get("life", "healthy") == "healthy":
        return str(node.get("state_reason") or "")
    due = f"; {units.age(node['life_due_s'])} left" if node.get("life_due_s") is not None else ""
    return f"{node.get('life_reason') or ''}{due}"


def _labels(node: Json) -> str:
    return ",".join(f"{key}={value}" for key, value in (node.get("labels") or {}).items())


COLUMNS = (
    Column("NAME", lambda node: str(node["name"])),
    Column("STATE", _state, state=True),
    Column("SLOTS", _slots, right=True),
    Column("POOL", lambda node: str(node.get("pool") or "-")),
    Column("JOBS", _jobs),
    Column("HEARD", _seen, right=True),
    Column("REASON", _reason),
    Column("LEMON", lambda node: f"{node.get('lemon_score', 0.0):g}", wide=True, right=True),
    Column("ROLE", lambda node: str(node.get("role") or "-"), wide=True),
    Column("ADDRESS", lambda node: ",".join(map(str, node.get("addresses") or [])) or "-", wide=True),
    Column("GPUS", lambda node: str(len(node.get("gpus") or [])), wide=True, right=True),
    Column("LABELS", _labels, wide=True),
)


def _takes(rule: Json) -> str:
    numbers = [f"XID {n}" for n in sorted(rule["xids"])] + [f"SXID {n}" for n in sorted(rule["sxids"])]
    return ", ".join((*numbers, *sorted(rule["signals"])))


HISTORY = (
    Column("TIME", lambda event: units.clock_time(event.get("at"))),
    Column("KIND", lambda event: str(event["kind"])),
    Column("BY", lambda event: str(event.get("principal") or "keepstep")),
    Column("WHAT", lambda event: str(event.get("text") or "")),
    Column("JOB", lambda event: str(event.get("job") or ""), wide=True),
)
RULES = (
    Column("RULE", lambda rule: str(rule["name"])),
    Column("TAKES", _takes),
    Column("CLASS", lambda rule: str(rule["of"])),
    Column("ACTIONS", lambda rule: ", then ".join(rule["actions"])),
    Column("WITHIN", lambda rule: units.age(rule["within_s"]), wide=True, right=True),
    Column("WHY", lambda rule: str(rule.get("why") or ""), wide=True),
)
SCREENED = (
    Column("NAME", lambda node: str(node["name"])),
    Column("RESULT", lambda node: str(node["result"]), state=True),
    Column("WHY", lambda node: str(node["text"])),
)
_HISTORY_MAX = 100_000
_LOOK_S = 0.5


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
        known = {
            "name", "state", "slots", "pool", "role", "addresses", "gpus", "labels", "attempts", "health",
            "history", "life_due_s", "life_reason", "lemon_score",
        }  # fmt: skip
        rest = {
            key: value for key, value in found.items() if key not in known and value not in (None, "", [], {})
        }
        told = [(key.replace("_", " "), _text(key, value)) for key, value in rest.items()]
        draw_pairs([*shown, *told, *_health(found)])

    emit(output, found, name=lambda: [str(found["name"])], table=page)


@app.command("history")
def history(ctx: typer.Context, node: NodeRef, output: Output = "table") -> None:
    """What happened to a node, who did it and why; what its validations came to, and how much it has cost."""
    client = connect(ctx)
    with suggesting(client, node, "/nodes", "nodes"):
        events = client.pages(f"/nodes/{ref(node)}/history", "events", limit=_HISTORY_MAX)
        found = client.get(f"/nodes/{ref(node)}/history", limit=1)
    lemon = found["lemon"]

    def page(wide: bool) -> None:
        draw(events, HISTORY, wide=wide, empty=f"nothing is known of {node}")
        weeks = " ".join(f"{score:g}" for score in lemon["weeks"])
        draw_pairs([("lemon score by week", f"{weeks}; replaced at {lemon['replace_at']:g}")])

    emit(
        output,
        {"events": events, "validations": found["validations"], "lemon": lemon},
        name=lambda: [str(event["id"]) for event in events],
        table=page,
    )


@app.command("cordon")
def cordon(ctx: typer.Context, node: NodeRef, reason: NodeReason = "", output: Output = "name") -> None:
    """Place nothing new on a node. What runs there goes on."""
    _mark(ctx, "cordon", node, reason, output)


@app.command("drain")
def drain(
    ctx: typer.Context,
    *,
    node: NodeRef,
    reason: NodeReason = "",
    deadline: Annotated[
        str, typer.Option("--deadline", help="When its job is ended there at the latest: 10m, 2h.")
    ] = "",
    output: Output = "name",
) -> None:
    """Let its job leave a node: as soon as a spare stands by, at the deadline at the latest."""
    within_s = {"deadline_s": duration_s(deadline, "--deadline")} if deadline else {}
    _mark(ctx, "drain", node, reason, output, **within_s)


@app.command("validate")
def validate(ctx: typer.Context, node: NodeRef, reason: NodeReason = "", output: Output = "name") -> None:
    """Take a node out of service when it is idle, and let it show that it computes right."""
    _mark(ctx, "validate", node, reason, output)


@app.command("screen")
def screen(
    ctx: typer.Context,
    *,
    nodes: Annotated[
        list[str] | None, typer.Argument(metavar="[NODE]...", help="Which; without: all idle ones.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Only show the last one, begin none.")] = False,
    output: Output = "table",
) -> None:
    """Try nodes by pairs until it is known which of them, or which links, are sick.

    Sick nodes are taken out and validated. Exit code 7 if there are any.
    """
    client = connect(ctx)
    found = client.get("/health/screening") if show else client.post("/health/screening", {"nodes": nodes})
    while not found["done"] and not show:
        time.sleep(_LOOK_S)
        found = client.get("/health/screening")
    emit(
        output,
        found,
        name=lambda: [str(node["name"]) for node in found["nodes"] if node["result"] == "sick"],
        table=lambda wide: draw(found["nodes"], SCREENED, wide=wide),
    )
    sick = [str(node["name"]) for node in found["nodes"] if node["result"] == "sick"]
    if sick or found["problem"]:
        raise JobFailed(found["problem"] or f"sick: {', '.join(sick)}")


@app.command("validated")
def validated(
    ctx: typer.Context,
    node: NodeRef,
    passed: Annotated[bool, typer.Option("--passed/--failed", help="What it came to.")],
    reason: NodeReason = "",
    output: Output = "name",
) -> None:
    """Say what a validation came to that you made by hand."""
    _mark(ctx, "validated", node, reason, output, passed=passed)


@app.command("note")
def note(
    ctx: typer.Context,
    node: NodeRef,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What others should know.")],
    output: Output = "name",
) -> None:
    """Write something down about a node."""
    _mark(ctx, "note", node, text, output)


@app.command("policy")
def policy(
    ctx: typer.Context,
    *,
    check: Annotated[
        str,
        typer.Option(
            "--check", metavar="FILE", help="Only say what is wrong with a file; needs no controller."
        ),
    ] = "",
    reload: Annotated[bool, typer.Option("--reload", help="Let the controller read its file anew.")] = False,
    output: Output = "table",
) -> None:
    """What a fault means and what is done about it."""
    if check:
        found = load_rules(Path(check))
        print(f"{check}: {len(found.rules)} rules, nothing is wrong", file=sys.stderr)
        return
    client = connect(ctx)
    answer = client.post("/health/policy/reload") if reload else client.get("/health/policy")
    rules = answer["policy"]["rules"]
    print(f"policy: {answer['source']}", file=sys.stderr)
    emit(
        output,
        answer,
        name=lambda: [str(rule["name"]) for rule in rules],
        table=lambda wide: draw(rules, RULES, wide=wide),
    )


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


def _mark(ctx: typer.Context, verb: str, node: str, reason: str, output: str, **more: float) -> None:
    """By what the node is now: if somebody else changes it in between, that is the answer."""
    client = connect(ctx)
    with suggesting(client, node, "/nodes", "nodes"):
        seen = client.get(f"/nodes/{ref(node)}")
        body = {"reason": reason, "revision": seen.get("revision"), **more}
        answer = client.post(f"/nodes/{ref(node)}/{verb}", body)
    emit(
        output,
        answer,
        name=lambda: [str(answer.get("name", node))],
        table=lambda wide: draw([answer], COLUMNS, wide=wide),
    )


def _health(node: Json) -> list[tuple[str, str]]:
    """What stands against it, what was noted, what its probes cannot see."""
    health, history = node.get("health") or {}, node.get("history") or {}
    rows = [
        ("check", f"{c['name']} {c.get('component', '')} {c.get('text', '')}".strip())
        for c in health.get("checks", ())
    ]
    rows += [
        ("probe", f"{p['name']}: {p['state']} {p.get('reason', '')}".strip())
        for p in health.get("probes", ())
        if p.get("state", "ok") != "ok"
    ]
    rows += [("needs", f"{n['action']}: {n['reason']}") for n in history.get("needs", ())]
    rows += [
        ("repair", f"{r['action']}, {units.age(r['age_s'])} ago: {r['outcome']} {r['text']}".strip())
        for r in history.get("repairs", ())
    ]
    return rows + [
        ("note", f"{n['text']} ({n['by']}, {units.age(n['age_s'])} ago)") for n in history.get("notes", ())
    ]


def _text(key: str, value: object) -> str:
    if key in ("first_seen", "last_seen") and isinstance(value, int | float):
        return units.clock_time(value)
    if key.endswith("_bytes") and isinstance(value, int | float):
        return units.size(value)
    return str(value)
