"""keepstep logs: what ranks printed, from wherever they run."""

import re
import sys
import time
from typing import Annotated, Any

import typer

from keepstep.cli.client import Client, Json, ref
from keepstep.cli.context import connect
from keepstep.cli.options import JobRef, duration_s, nodes_alive, suggesting
from keepstep.cli.render import colourful
from keepstep.core.clock import SystemClock
from keepstep.core.errors import InputError, Unreachable
from keepstep.core.states import JOB

app = typer.Typer(rich_markup_mode=None)

_COLOURS = (36, 33, 35, 32, 34, 96, 93, 95)  # of the prefixes, by rank
_RECONNECT_S = 30.0
_ERROR_LINES = 50
_FINAL = frozenset(str(state) for state in JOB.final)


@app.command("logs")
def logs(
    ctx: typer.Context,
    *,
    job: JobRef = "@last",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    rank: Annotated[str, typer.Option("--rank", help="Ranks: 0,7 or 0-3.")] = "",
    role: Annotated[str, typer.Option("--role", help="Ranks by coordinates: pp=1,dp=0.")] = "",
    node: Annotated[str, typer.Option("--node", help="Ranks of a node.", autocompletion=nodes_alive)] = "",
    attempt: Annotated[int, typer.Option("--attempt", help="Of this attempt; 0: the newest.")] = 0,
    since: Annotated[str, typer.Option("--since", help="Not older than this: 10m.")] = "",
    tail: Annotated[int, typer.Option("--tail", help="Only the last lines of each rank; -1: all.")] = -1,
    grep: Annotated[str, typer.Option("--grep", help="Only lines that match this regular expression.")] = "",
    first_error: Annotated[
        bool, typer.Option("--first-error", help="The first failing rank's last lines and error.")
    ] = False,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="text|json", help="What to print.")
    ] = "text",
) -> None:
    """What ranks printed. A prefix names the rank where more than one is shown."""
    if output not in ("text", "json"):
        raise InputError(f"-o {output}: there is no such output", next="There are: text, json.")
    try:
        re.compile(grep)
    except re.error as error:
        raise InputError(f"{grep!r} is no regular expression", where="--grep", why=str(error)) from error
    client = connect(ctx)
    with suggesting(client, job):
        found = client.get(f"/jobs/{ref(job)}")
    query: Json = {
        "rank": ",".join(str(number) for number in ranks_of(rank)) if rank else "",
        "role": role, "node": node, "attempt": attempt or "",
        "since_s": duration_s(since, "--since") if since else "",
        "tail": tail if tail >= 0 else "", "grep": grep, "first_error": first_error, "follow": follow,
    }  # fmt: skip
    if first_error:
        query = _of_culprit(client, str(found["id"]), query)
    several = found.get("world_size", 1) > 1 and len(ranks_of(str(query["rank"]))) != 1
    _print_lines(client, str(found["id"]), query, Lines(several=several, json=output == "json"))


class Lines:
    """Prints log lines, each with its rank's prefix where several ranks are shown."""

    def __init__(self, *, several: bool, json: bool = False) -> None:
        self._several, self._json = several, json
        self._colour = colourful()

    def show(self, line: Json) -> None:
        if line.get("error") is not None:
            print(f"keepstep: node {line.get('node')}: {line['error']}", file=sys.stderr)
            return
        if self._json:
            import json

            text = json.dumps(line)
        elif self._several and line.get("rank") is not None:
            text = f"{self._prefix(line['rank'])} {line.get('line', '')}"
        else:
            text = str(line.get("line", ""))
        sys.stdout.write(text + "\n")

    def _prefix(self, rank: int) -> str:
        prefix = f"[rank {rank}]"
        return f"\x1b[{_COLOURS[rank % len(_COLOURS)]}m{prefix}\x1b[0m" if self._colour else prefix


def _of_culprit(client: Client, job: str, query: Json) -> Json:
    """The question for the last lines of the rank that the newest incident blames; stderr names it."""
    incidents = client.get(f"/jobs/{ref(job)}/incidents")["incidents"]
    attempt = query["attempt"]
    blamed = [one for one in incidents if one["culprit"].get("rank") is not None]
    newest = next((one for one in blamed if attempt in ("", one["attempt"])), None)
    if newest is None:
        return query
    print(f"keepstep: incident {newest['id']}: {newest['evidence'].get('what')}", file=sys.stderr)
    lines = query["tail"] if query["tail"] != "" else _ERROR_LINES
    return {
        **query, "first_error": False, "rank": newest["culprit"]["rank"], "attempt": newest["attempt"],
        "tail": lines,
    }  # fmt: skip


def ranks_of(text: str) -> list[int]:
    """0,7 or 0-3,9 as numbers, in order and once each."""
    found: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise InputError(f"{part!r} names no rank", where="--rank", next="Give numbers: 0,7 or 0-3.")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def _print_lines(client: Client, job: str, query: Json, lines: Lines) -> None:
    """Print, and when the connection breaks while following, take it up again from there on."""
    path, clock = f"/jobs/{ref(job)}/logs", SystemClock()
    lost_at: float | None = None
    while True:
        try:
            for line in client.lines(path, **query):
                lost_at = None
                lines.show(line)
                if query["follow"]:
                    sys.stdout.flush()
            if not query["follow"] or _ended(client, job):
                return
        except Unreachable as error:
            if not query["follow"]:
                raise
            now = clock.monotonic()
            if lost_at is None:
                lost_at = now
                print(f"keepstep: {error.why or error.what}; connecting again", file=sys.stderr)
            elif now - lost_at > _RECONNECT_S:
                raise
        time.sleep(0.5)
        query = _later(query)


def _later(query: Json) -> dict[str, Any]:
    """The same question, for what is printed from now on."""
    return {**query, "tail": 0, "since_s": ""}


def _ended(client: Client, job: str) -> bool:
    return client.get(f"/jobs/{ref(job)}")["state"] in _FINAL
