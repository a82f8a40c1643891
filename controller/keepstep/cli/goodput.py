"""keepstep goodput: the ledger, every slot-second in exactly one bucket."""

import typer

from keepstep.cli import units
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
            name=lambda: [f"{goodput_of(ledger):.4f}"],
            table=lambda wide: _page(ledger),
        )

    repeat(show, watch=watch)


def buckets_of(ledger: Json) -> dict[str, float]:
    """Slot-seconds by bucket, of the gang's own slots."""
    found = ledger.get("buckets") or {}
    if isinstance(found, list):
        found = {row["bucket"]: row["slot_s"] for row in found}
    return {str(name): float(value) for name, value in found.items()}


def goodput_of(ledger: Json) -> float:
    """The productive share, as the controller counts it, else of its buckets."""
    if ledger.get("goodput") is not None:
        return float(ledger["goodput"])
    buckets = buckets_of(ledger)
    total = sum(buckets.values())
    return buckets.get("productive", 0.0) / total if total else 0.0


def rows(ledger: Json) -> list[Json]:
    buckets = buckets_of(ledger)
    total = sum(buckets.values())
    return [
        {"bucket": name.replace("_", " "), "slot_s": value, "share": value / total if total else 0.0}
        for name, value in [*sorted(buckets.items(), key=lambda item: -item[1]), ("total", total)]
    ]


def one_line(ledger: Json) -> str:
    """goodput 88.4 %: productive 31.2 s | starting 1.9 | ... in seconds of the whole gang."""
    buckets = buckets_of(ledger)
    slots = float(ledger.get("slots") or 1)
    productive = buckets.pop("productive", 0.0)
    rest = [f"{name.replace('_', ' ')} {value / slots:.1f}" for name, value in buckets.items() if value > 0]
    return f"goodput {100 * goodput_of(ledger):.1f} %: " + " | ".join(
        [f"productive {productive / slots:.1f} s", *rest]
    )


def _page(ledger: Json) -> None:
    print(f"goodput {100 * goodput_of(ledger):.1f} %")
    draw(rows(ledger), COLUMNS)
    standby = ledger.get("standby_s") or ledger.get("spares_s")
    if isinstance(standby, int | float) and standby > 0:
        print(f"spares stood by for {units.seconds(standby)} more, which goodput does not count")
