"""Opening a store: fresh, of an older version, of a newer one, of somebody else, or where it must not be."""

import os
import re
import shutil
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from keepstep.core.clock import ManualClock, SystemClock
from keepstep.core.errors import Fenced, InputError, Refused, Unreachable
from keepstep.store import Store, this_process
from keepstep.store.engines import connect, file_system, refuse_network
from keepstep.store.migrate import HEAD, SCRIPTS, prepare
from keepstep.store.tables import metadata

NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("colour", sa.Text(), nullable=False, server_default="blue"))
        jobs.alter_column("queue", new_column_name="line")
"""


@pytest.fixture
def next_version(tmp_path: Path) -> Path:
    """The migrations of a version to come, which rebuilds a table that others refer to."""
    folder = tmp_path / "next"
    shutil.copytree(SCRIPTS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / "r9999_next.py").write_text(NEXT.format(head=HEAD))
    return folder


def migrate(url: str, scripts: Path, patience_s: float = 0.3) -> None:
    engine = connect(url, busy_s=5.0)
    try:
        prepare(engine, clock=SystemClock(), patience_s=patience_s, scripts=scripts, head="9999")
    finally:
        engine.dispose()


def with_a_job(url: str) -> Store:
    store = Store.open(url, clock=SystemClock())
    store.acquire(this_process())
    with store.transaction() as write:
        job = write.add_job(name="a", spec={}, pool="local")
        write.add_attempt(job=job.id, number=1, nodes=[], layout={}, state="placed")
    return store


def test_migrations_make_the_tables_that_the_code_has(store_url: str) -> None:
    assert ScriptDirectory(str(SCRIPTS)).get_current_head() == HEAD
    Store.open(store_url, clock=ManualClock()).close()
    engine = connect(store_url, busy_s=5.0)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": "schema_version", "compare_type": True}
        )
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_an_older_store_is_copied_and_migrated(store_url: str, next_version: Path) -> None:
    store = with_a_job(store_url)
    store.release()
    migrate(store_url, next_version)
    engine = sa.create_engine(store_url)
    with engine.connect() as connection:
        row = connection.execute(sa.text("SELECT name, colour, line FROM jobs")).one()
        attempts = connection.execute(sa.text("SELECT count(*) FROM attempts")).scalar()
    engine.dispose()
    store.close()
    assert (tuple(row), attempts) == (("a", "blue", "default"), 1)
    if store_url.startswith("sqlite"):
        copy = Path(f"{sa.make_url(store_url).database}.before-9999")
        assert copy.stat().st_mode & 0o777 == 0o600
        old = Store.open(str(copy), clock=ManualClock())
        assert old.job("@last").name == "a"
        old.close()


def test_a_migration_ends_the_old_term(store_url: str, next_version: Path) -> None:
    """An old controller that was stopped while its store was migrated must not write its old rows."""
    store = with_a_job(store_url)
    migrate(store_url, next_version)
    with pytest.raises(Fenced):
        store.beat()
    store.close()


def test_a_store_that_is_at_work_is_not_migrated(store_url: str, next_version: Path) -> None:
    store = with_a_job(store_url)

    class Beating(ManualClock):
        def monotonic(self) -> float:
            store.beat()
            return super().monotonic()

    engine = connect(store_url, busy_s=5.0)
    with pytest.raises(Refused, match=str(os.getpid())):
        prepare(engine, clock=Beating(), patience_s=5.0, scripts=next_version, head="9999")
    engine.dispose()
    store.beat()
    store.close()


def test_a_newer_store_is_refused_with_advice(store_url: str, next_version: Path) -> None:
    with_a_job(store_url).close()
    migrate(store_url, next_version)
    with pytest.raises(InputError, match="newer keepstep") as refused:
        Store.open(store_url, clock=ManualClock())
    assert "9999" in refused.value.why
    assert "Install that version" in refused.value.next


def test_somebody_elses_database_is_left_alone(store_url: str) -> None:
    engine = connect(store_url, busy_s=5.0)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(InputError, match="not a keepstep store"):
        Store.open(store_url, clock=ManualClock())
    assert sa.inspect(engine).get_table_names() == ["recipes"]
    engine.dispose()


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    file.write_text("not a database, but long enough to be taken for the beginning of one\n" * 20)
    before = file.read_bytes()
    with pytest.raises(InputError, match="not a keepstep store"):
        Store.open(str(file), clock=ManualClock())
    assert file.read_bytes() == before


@pytest.mark.parametrize("url", ["mysql://a@b/c", "sqlite://", "sqlite:///:memory:", "nonsense://x", "://"])
def test_a_url_that_cannot_be_used_is_an_input_error(url: str) -> None:
    with pytest.raises(InputError):
        Store.open(url, clock=ManualClock())


def test_no_server_is_unreachable_and_no_password_is_shown() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(Unreachable) as failed:
        Store.open("postgresql+psycopg://ada:hunter2@127.0.0.1:1/x?connect_timeout=2", clock=ManualClock())
    assert "hunter2" not in str(failed.value)


def test_network_file_systems_are_refused(tmp_path: Path) -> None:
    for magic, name in ((0x6969, "NFS"), (0xFE534D42, "SMB"), (0x01021997, "9p"), (0x0BD00BD0, "Lustre")):
        with pytest.raises(InputError, match=re.escape(name)) as refused:
            refuse_network(tmp_path, magic=magic)
        assert "local disk" in refused.value.next
    with pytest.raises(InputError, match="sshfs"):
        refuse_network(tmp_path, magic=0x65735546, kind="fuse.sshfs")
    refuse_network(tmp_path, magic=0x65735546, kind="fuseblk")
    refuse_network(tmp_path)


def test_file_systems_are_told_apart_by_the_kernel() -> None:
    assert file_system(Path("/proc")) == 0x9FA0
    with pytest.raises(FileNotFoundError):
        file_system(Path("/proc/nothing here"))
