"""keepstep goodput: the ledger, every slot-second in exactly one bucket."""

import typer

from keepstep.cli.client import Json, ref
from keepstep.cli.context import connect
from keepstep.cli.options import JobRef, Output, Watch, suggesting
from keepstep.cli.render import Column, draw, emit
from keepstep.cli.watch import repeat

app = typer.Typer(rich_markup_mode=None)

COLUMNS = (
    Column("BUCKET", lambda row: str(row["bucket"])),
    Column("SLOT-SECONDS", lambda row: f"{row['slot_s']:.1f}", right=True),
    Column("SHARE", lambda row: f"{100 * row['share']:.1f} %", right=True),
)


@app.command("goodput")
def goodput(
    ctx: typer.Context, job: JobRef = "@last", output: Output = "table", watch: Watch = False
) -> None:
    """Where a job's slot-seconds went. The buckets add up to the total; spares stand apart."""
    client = connect(ctx)

    def show() -> None:
        with suggesting(client, job):
            ledger = client.get(f"/jobs/{ref(job)}/goodput")
        emit(
            output,
            ledger,
            name=lambda: [percent(ledger["goodput"])],
            table=lambda wide: _page(ledger),
        )

    repeat(show, watch=watch)


def rows(ledger: Json) -> list[Json]:
    """Every bucket that has something in it, largest first, and their total."""
    total = float(ledger["total"])
    buckets = sorted(ledger["buckets"].items(), key=lambda item: -item[1])
    shown = [(name, seconds) for name, seconds in buckets if seconds > 0]
    return [
        {"bucket": name, "slot_s": seconds, "share": seconds / total if total else 0.0}
        for name, seconds in [*shown, ("total", total)]
    ]


def one_line(ledger: Json, slots: int) -> str:
    """goodput 88.4 %: productive 31.2 s | starting 1.9 | ... in seconds of a gang of `slots`."""
    buckets = {name: seconds / slots for name, seconds in ledger["buckets"].items() if name != "standby"}
    productive = buckets.pop("productive", 0.0)
    rest = [f"{name} {seconds:.1f}" for name, seconds in buckets.items() if seconds >= 0.05]
    return f"goodput {percent(ledger['goodput'])}: " + " | ".join([f"productive {productive:.1f} s", *rest])


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _page(ledger: Json) -> None:
    print(f"goodput {percent(ledger['goodput'])}")
    draw(rows(ledger), COLUMNS)
    if ledger["buckets"].get("standby"):
        print(f"with the spares' standing by: {percent(ledger['goodput_with_spares'])}")
    for incident, buckets in ledger.get("incidents", {}).items():
        cost = ", ".join(f"{name} {seconds:.1f}" for name, seconds in buckets.items() if seconds > 0)
        print(f"incident {incident} cost {sum(buckets.values()):.1f} slot-seconds: {cost}")
