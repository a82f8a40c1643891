"""The databases that the store's suite runs over."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

POSTGRES = "KEEPSTEP_TEST_POSTGRES"


KINDS = ["sqlite", "postgresql"] if os.environ.get(POSTGRES) else ["sqlite"]


@pytest.fixture(params=KINDS)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of each kind; a PostgreSQL one gets a schema of its own, dropped after."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store' / 'store.db'}"
        return
    given = os.environ[POSTGRES]
    schema = f"keepstep_{secrets.token_hex(6)}"
    engine = sa.create_engine(given)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    url = sa.make_url(given).update_query_dict({"options": f"-csearch_path={schema}"})
    yield url.render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
    engine.dispose()
