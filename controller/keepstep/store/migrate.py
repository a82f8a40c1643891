"""Brings a database to this version's schema, or says why it cannot.

The whole of it is one transaction with the old schema's term ended in it: a controller of an older version
that wakes up afterwards is refused. A SQLite file is copied first.
"""

from importlib.metadata import version
from pathlib import Path

import sqlalchemy as sa

from keepstep.core.clock import Clock
from keepstep.core.errors import InputError
from keepstep.store import lease, tables
from keepstep.store.engines import answering, back_up, lock_schema, migrating

HEAD = "0003"  # the newest revision in migrations/versions
SCRIPTS = Path(__file__).parent / "migrations"

_WRITTEN_BY = "schema_written_by"
_VERSION = sa.Table("schema_version", sa.MetaData(), sa.Column("version_num", sa.Text))


def prepare(
    engine: sa.Engine, *, clock: Clock, patience_s: float, scripts: Path = SCRIPTS, head: str = HEAD
) -> bool:
    """Makes or migrates the schema as needed; True for a database that was empty."""
    found = _revision(engine)
    if found == head:
        return False
    if found is not None:
        _refuse_newer(engine, found, scripts)
        lease.wait_until_free(engine.connect, clock=clock, patience_s=patience_s)
        back_up(engine, f"before-{head}")
    with answering(engine), migrating(engine).begin() as connection:
        lock_schema(connection)
        fresh = not sa.inspect(connection).has_table(tables.meta.name)  # another opener may have been faster
        _upgrade(connection, scripts, head)
        if not fresh and found is not None:
            lease.take_from_all(connection)
    engine.dispose()  # a migration's connections check no foreign keys
    return fresh


def _revision(engine: sa.Engine) -> str | None:
    """The database's schema; None for an empty one."""
    with answering(engine), engine.connect() as connection:
        inspector = sa.inspect(connection)
        if inspector.has_table(_VERSION.name) and inspector.has_table(tables.lease.name):
            return str(connection.execute(sa.select(_VERSION.c.version_num)).scalar_one())
        if inspector.get_table_names():
            raise InputError(
                "this database is not a keepstep store",
                where=_name(engine),
                why="it has tables, but no schema version",
                next="Give keepstep a database of its own.",
            )
        return None


def _refuse_newer(engine: sa.Engine, found: str, scripts: Path) -> None:
    from alembic.script import ScriptDirectory
    from alembic.util.exc import CommandError

    try:
        ScriptDirectory(str(scripts)).get_revision(found)
    except CommandError:
        with answering(engine), engine.connect() as connection:
            by = sa.select(tables.meta.c.value).where(tables.meta.c.key == _WRITTEN_BY)
            writer = connection.execute(by).scalar() or "of a newer version"
        raise InputError(
            f"the store was written by a newer keepstep ({writer})",
            where=_name(engine),
            why=f"its schema is {found}, the newest that this version knows is {HEAD}",
            next="Install that version again, or put back the copy that it made beside the store "
            f"before it migrated (*.before-{found}).",
        ) from None


def _upgrade(connection: sa.Connection, scripts: Path, head: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    command.upgrade(config, head)
    meta = tables.meta
    connection.execute(sa.delete(meta).where(meta.c.key == _WRITTEN_BY))
    connection.execute(sa.insert(meta).values(key=_WRITTEN_BY, value=version("keepstep")))


def _name(engine: sa.Engine) -> str:
    return engine.url.render_as_string(hide_password=True)
