"""The tables, in words that every database has. What rows mean: rows.py; how they came to be: migrations/."""

import sqlalchemy as sa
from sqlalchemy import JSON, Boolean, Column, Float, ForeignKey, Index, Integer, Text

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _text(name: str) -> "Column[str]":
    return Column(name, Text, nullable=False, default="")


def _json(name: str) -> "Column[object]":
    return Column(name, JSON, nullable=False)


def _time(name: str, *, always: bool = False) -> "Column[float]":
    return Column(name, Float(53), nullable=not always)


def _number() -> "Column[int]":
    """A key that the database counts up and, also after deletions, never gives twice."""
    return Column("id", Integer, primary_key=True, autoincrement=True)


def _job() -> "Column[str]":
    return Column("job", Text, ForeignKey("jobs.id"), nullable=False, primary_key=True)


meta = sa.Table("meta", metadata, Column("key", Text, primary_key=True), _text("value"))

# One row. Its shape is promised to every later version: an old store is opened by reading it.
lease = sa.Table(
    "lease",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("term", Integer, nullable=False),
    Column("beat", Integer, nullable=False),
    Column("holder", JSON(none_as_null=True)),
    _time("acquired_at", always=True),
    _time("beat_at"),
)

tokens = sa.Table(
    "tokens",
    metadata,
    _number(),
    Column("hash", Text, nullable=False, unique=True),
    _text("name"),
    _text("kind"),
    Column("role", Text),
    Column("node", Text),
    _text("principal"),
    _text("project"),
    _time("created_at", always=True),
    _time("expires_at"),
    _time("revoked_at"),
    _time("last_used_at"),
    Column("uses_left", Integer),
    sqlite_autoincrement=True,
)

jobs = sa.Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("number", Integer, nullable=False, unique=True),
    _text("name"),
    _text("project"),
    _text("principal"),
    _json("spec"),
    _json("source"),
    _text("pool"),
    _text("queue"),
    Column("priority", Integer, nullable=False),
    Column("attached_node", Text),
    _text("wanted"),
    _text("wanted_by"),
    _text("wanted_reason"),
    _text("state"),
    _text("reason"),
    Column("attempt", Integer, nullable=False),
    _json("restarts"),
    Column("exit_code", Integer),
    _time("created_at", always=True),
    _time("started_at"),
    _time("finished_at"),
    _time("not_before"),
    Index(None, "name"),
    Index(None, "finished_at"),
)

attempts = sa.Table(
    "attempts",
    metadata,
    _job(),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("term", Integer, nullable=False),
    Column("parent_attempt", Integer),
    Column("parent_step", Integer),
    _text("state"),
    _text("rung"),
    _text("reason"),
    _json("nodes"),
    _json("spares"),
    _json("layout"),
    Column("restore", JSON(none_as_null=True)),
    Column("master", JSON(none_as_null=True)),
    _time("placed_at", always=True),
    _time("first_step_at"),
    _time("ended_at"),
    _text("outcome"),
    Column("incident", Integer, ForeignKey("incidents.id")),
)

nodes = sa.Table(
    "nodes",
    metadata,
    Column("name", Text, primary_key=True),
    _text("pool"),
    _text("role"),
    _text("instance"),
    Column("slots", Integer, nullable=False),
    _text("state"),
    _text("state_reason"),
    _json("addresses"),
    _json("labels"),
    _json("gpus"),
    _text("boot_id"),
    _json("versions"),
    _time("first_seen", always=True),
    _time("last_seen", always=True),
)

lives = sa.Table(
    "lives",
    metadata,
    Column("node", Text, primary_key=True),
    _text("state"),
    _text("owner"),
    _text("reason"),
    Column("revision", Integer, nullable=False),
    _time("changed_at", always=True),
    _json("data"),
)

validations = sa.Table(
    "validations",
    metadata,
    _number(),
    Column("node", Text, nullable=False),
    _time("at", always=True),
    _text("job"),
    Column("passed", Boolean, nullable=False),
    _text("text"),
    _json("figures"),
    Index(None, "node", "id"),
    sqlite_autoincrement=True,
)

decisions = sa.Table(
    "decisions",
    metadata,
    _number(),
    _time("at", always=True),
    Column("term", Integer, nullable=False),
    _text("project"),
    Column("job", Text, ForeignKey("jobs.id"), index=True),
    _text("kind"),
    _text("reason"),
    _json("rejected"),
    _json("plan"),
    _json("slice"),
    sqlite_autoincrement=True,
)

incidents = sa.Table(
    "incidents",
    metadata,
    _number(),
    _text("project"),
    Column("job", Text, ForeignKey("jobs.id"), index=True),
    Column("attempt", Integer),
    _text("verdict"),
    _text("state"),
    _json("culprit"),
    Column("culprit_node", Text),  # from the culprit, to find what happened there before
    Column("culprit_rank", Integer),
    _json("evidence"),
    Column("decision", Integer, ForeignKey("decisions.id")),
    _time("opened_at", always=True),
    _time("decided_at"),
    _time("recovered_at"),
    _time("closed_at"),
    _json("costs"),
    _json("same_before"),
    Index(None, "verdict", "culprit_node"),
    sqlite_autoincrement=True,
)

timeline = sa.Table(
    "timeline",
    metadata,
    _number(),
    _time("at", always=True),
    _text("project"),
    _text("principal"),
    Column("job", Text),  # no foreign keys: history names things that may be gone
    Column("attempt", Integer),
    Column("node", Text),
    Column("incident", Integer),
    _text("kind"),
    _text("text"),
    _json("data"),
    Index(None, "job", "id"),
    Index(None, "node", "id"),
    sqlite_autoincrement=True,
)

points = sa.Table(
    "points",
    metadata,
    _job(),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("step", Integer, primary_key=True, autoincrement=False),
    _time("at", always=True),
    Column("loss", Float(53)),
    Column("grad_norm", Float(53)),
    Column("tokens_per_s", Float(53)),
    Column("tflops", Float(53)),
    Column("mfu", Float(53)),
    Index(None, "job", "step"),
)

evaluations = sa.Table(
    "evaluations",
    metadata,
    _job(),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("source", Text, primary_key=True),
    _time("at", always=True),
    Column("loss", Float(53)),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    _job(),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("step", Integer, primary_key=True, autoincrement=False),
    _time("seen_at", always=True),
    Column("complete", Boolean, nullable=False),
)
