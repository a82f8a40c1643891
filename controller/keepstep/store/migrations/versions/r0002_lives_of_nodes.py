"""Nodes have a life as hardware. A cordon was a mark beside the node; now it is one state of that life."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    lives = op.create_table(
        "lives",
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("changed_at", sa.Float(precision=53), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("node", name=op.f("pk_lives")),
    )
    op.create_table(
        "validations",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(precision=53), nullable=False),
        sa.Column("job", sa.Text(), nullable=False),
        sa.Column("passed", sa.Boolean(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("figures", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_validations")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_validations_node_id"), "validations", ["node", "id"], unique=False)
    op.create_index(op.f("ix_timeline_node_id"), "timeline", ["node", "id"], unique=False)
    _carry_cordons(lives)
    with op.batch_alter_table("nodes") as nodes:
        for name in ("cordoned", "cordon_reason", "cordoned_by"):
            nodes.drop_column(name)


def _carry_cordons(lives: sa.Table) -> None:
    """A cordon of the old kind is a person's: only a person ends it."""
    columns = ("name", "cordoned", "cordon_reason", "cordoned_by", "last_seen")
    nodes = sa.table("nodes", *(sa.column(name) for name in columns))
    query = sa.select(nodes).where(nodes.c.cordoned == sa.true())
    for name, _, reason, by, seen in op.get_bind().execute(query).all():
        row = {"node": name, "state": "cordoned", "owner": by or "unknown", "reason": reason, "revision": 1}
        op.bulk_insert(lives, [{**row, "changed_at": seen, "data": {**row, "out_at": 0.0}}])
