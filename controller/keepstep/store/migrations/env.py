"""Where Alembic begins: store/migrate.py hands it a connection; people who write a revision give a URL.

alembic -x url=sqlite:////tmp/scratch.db revision --autogenerate -m "what changes"
"""

import sqlalchemy as sa
from alembic import context

from keepstep.store import tables
from keepstep.store.engines import connect


def migrate(connection: sa.Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=tables.metadata,
        version_table="schema_version",
        transactional_ddl=True,
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given: sa.Connection | None = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    with connect(context.get_x_argument(as_dictionary=True)["url"], busy_s=10.0).begin() as own:
        migrate(own)
