"""What tests share: databases with the extension, and connections that are opened one after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import psycopg2
from pg_idempotency import Scope

DRIVERS: dict[str, Any] = {"psycopg": psycopg, "psycopg2": psycopg2}


class Database:
    """
    A database with the extension, and what tests look at in it.

    url: where it is.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._own = psycopg.connect(url, autocommit=True)

    def connect(self, driver: str = "psycopg", autocommit: bool = True, **arguments: Any) -> Any:
        """A new connection of a driver; the other arguments are those of its ``connect``. Close it."""
        return connected(self.url, driver, autocommit, **arguments)

    def query(self, text: str, *values: Any) -> list[Any]:
        """The rows of a statement, each in a transaction of its own, on a connection that no test uses otherwise."""
        cursor = self._own.execute(text, values or None)
        return [] if cursor.description is None else cursor.fetchall()

    def record(self, scope: Scope) -> Any:
        """State, status, text of the response and recovery point of the record of a scope, or None."""
        columns = "state::text, status_code, response::text, recovery_point"
        rows = self.query(f"SELECT {columns} FROM idempotency.idempotency_key WHERE key = %s", scope.key)
        return rows[0] if rows else None

    def waits(self, pattern: str) -> bool:
        """Whether a statement whose text matches a pattern waits for a lock."""
        query = (
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND state = 'active' AND wait_event_type = 'Lock' AND query ~ %s"
        )
        return self.query(query, pattern) != []

    def has_claims(self) -> bool:
        """Whether a transaction holds a claim, or waits for one."""
        this = "(SELECT oid FROM pg_database WHERE datname = current_database())"
        return self.query(f"SELECT FROM pg_locks WHERE locktype = 'userlock' AND database = {this}") != []

    @contextmanager
    def held_up(self, table: str) -> Iterator[None]:
        """While this lasts, a COMMIT after rows were written to a table waits for the advisory lock 1."""
        self.query(
            "CREATE OR REPLACE FUNCTION held_up() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$"
        )
        self.query(
            f"CREATE CONSTRAINT TRIGGER held_up AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION held_up()"
        )
        yield
        self.query(f"DROP TRIGGER held_up ON {table}")

    def terminate(self, connection: Any) -> None:
        """End the server's side of a connection of a driver."""
        self.query("SELECT pg_terminate_backend(%s, 10000)", pid_of(connection))

    def close(self) -> None:
        """Close the connection of ``query``."""
        self._own.close()


def connected(url: str, driver: str, autocommit: bool, **arguments: Any) -> Any:
    """A new connection of a driver; the other arguments are those of its ``connect``."""
    connection = DRIVERS[driver].connect(url, **arguments)
    connection.autocommit = autocommit
    return connection


def opener(url: str, driver: str, autocommit: bool, **arguments: Any) -> Callable[[], AbstractContextManager[Any]]:
    """What opens a connection each time, as the method ``connection`` of a pool does."""

    @contextmanager
    def opened() -> Iterator[Any]:
        connection = connected(url, driver, autocommit, **arguments)
        try:
            yield connection
        finally:
            connection.close()

    return opened


@contextmanager
def created_database(schema: str = "idempotency") -> Iterator[Database]:
    """A new database that is dropped afterwards, with the extension in a schema."""
    server_url = os.environ["DATABASE_URL"]
    name = f"python_test_{uuid4().hex[:12]}"
    with psycopg.connect(server_url, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} TEMPLATE template1")
        try:
            database = Database(urlsplit(server_url)._replace(path=f"/{name}").geturl())
            if schema != "idempotency":
                quoted = psycopg.sql.Identifier(schema).as_string(server)
                database.query("DROP EXTENSION idempotency")
                database.query(f"CREATE SCHEMA {quoted}")
                database.query(f"CREATE EXTENSION idempotency SCHEMA {quoted}")
            yield database
            database.close()
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def answer_behind_its_back(connection: Any, scope: Scope) -> None:
    """Write an answer with status 202 without asking the extension, as another node might."""
    execute(
        connection,
        "INSERT INTO idempotency.idempotency_key"
        " (tenant, action, key, actor, state, status_code, attempt, created_at, finished_at, expires_at)"
        " VALUES (%s, %s, %s, %s, 'completed', 202, 1, now(), now(), now() + interval '1 day')",
        scope.tenant,
        scope.action,
        scope.key,
        scope.actor,
    )


def new_scope(**changes: Any) -> Scope:
    """What no other request is known by."""
    return Scope(**{"tenant": "acme", "actor": "alice", "action": "orders.create", "key": str(uuid4()), **changes})


def is_idle(connection: Any) -> bool:
    """Whether no transaction is open on a connection of a driver, and it can be used."""
    return bool(connection.info.transaction_status == 0)


def pid_of(connection: Any) -> int:
    """The process of the server that a connection of a driver has."""
    return int(connection.info.backend_pid)


def execute(connection: Any, text: str, *values: Any) -> list[Any]:
    """A statement over a connection of either driver."""
    cursor = connection.cursor()
    cursor.execute(text, values or None)
    return [] if cursor.description is None else list(cursor.fetchall())


def commit(connection: Any) -> None:
    """Commit, in the way of the mode of a connection."""
    if connection.autocommit:
        execute(connection, "COMMIT")
    else:
        connection.commit()


def rollback(connection: Any) -> None:
    """Roll back, in the way of the mode of a connection."""
    if connection.autocommit:
        execute(connection, "ROLLBACK")
    else:
        connection.rollback()


def until(condition: Callable[[], Any]) -> None:
    """Wait until something is so. Raises AssertionError if it is not in half a minute."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come to be so")
