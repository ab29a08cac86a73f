"""
Fixtures of all tests: a database with the extension for each file, and connections of both drivers.

The server is that of DATABASE_URL, whose template1 has the extension in schema ``idempotency``. Its user may
create databases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from pg_idempotency import Scope
from support import Database, created_database, new_scope, opener


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """A database of its own for each file of tests."""
    with created_database() as database:
        yield database


@pytest.fixture(params=["psycopg", "psycopg2"])
def driver(request: Any) -> Any:
    """Each driver in turn."""
    return request.param


@pytest.fixture(params=[True, False], ids=["autocommit", "no-autocommit"])
def autocommit(request: Any) -> Any:
    """Each mode of a connection in turn."""
    return request.param


@pytest.fixture
def connection(database: Database, driver: str, autocommit: bool) -> Iterator[Any]:
    """A connection of each driver, in each mode."""
    connection = database.connect(driver, autocommit)
    yield connection
    connection.close()


@pytest.fixture
def connect(database: Database, driver: str, autocommit: bool) -> Callable[[], AbstractContextManager[Any]]:
    """What opens connections of each driver, in each mode, as the method ``connection`` of a pool does."""
    return opener(database.url, driver, autocommit)


@pytest.fixture
def scope() -> Scope:
    """What no other request is known by."""
    return new_scope()
