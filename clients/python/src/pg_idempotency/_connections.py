"""
What the client does with a connection, for each kind of it: begin, send a statement, commit, roll back.

Where drivers differ:

- PostgreSQL answers the COMMIT of a transaction that has failed with ROLLBACK, and no driver says so.
  With psycopg COMMIT is sent as a statement, to read its command tag. psycopg2 has its own idea of
  whether a transaction is open, so it has to send COMMIT itself; libpq knows before whether the
  transaction has failed, and then it is not sent.
- Outside of autocommit mode the drivers send BEGIN before the first statement; in autocommit mode it is
  sent here.
- When the connection breaks during COMMIT, nobody knows whether it took effect. Only the server can say
  that it did not.
- Some versions of psycopg leave an asynchronous connection in the middle of a statement when its task is
  cancelled. Nothing can be sent then, so a connection that cannot be rolled back is closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn, Protocol

from ._statements import Statement
from .errors import CommitUnknownError, OutOfOrderError, RolledBackError, sqlstate_of

Row = dict[str, Any]

_BEGIN = Statement("BEGIN", ())
_COMMIT = Statement("COMMIT", ())
_ROLLBACK = Statement("ROLLBACK", ())
_SAVEPOINT = Statement("SAVEPOINT idempotency_work", ())
_UNDO = Statement("ROLLBACK TO SAVEPOINT idempotency_work", ())


class Session(Protocol):
    """A connection, as the flows use it. The results of an asynchronous one are awaited before they get there."""

    #: what the work gets
    connection: Any

    def is_idle(self) -> bool:
        """Whether no transaction is open."""

    def is_lost(self) -> bool:
        """Whether the connection has turned out to be closed."""

    def begin(self) -> Any:
        """Begin a transaction."""

    def fetch(self, statement: Statement) -> Any:
        """Send a statement, and return its rows."""

    def commit(self) -> Any:
        """Commit. Raises RolledBackError if that did not take effect, CommitUnknownError if nobody knows."""

    def rollback(self) -> Any:
        """Roll back what is open, if anything is and the connection still lives."""

    def set_savepoint(self) -> Any:
        """Set the savepoint that ``undo`` goes back to."""

    def undo(self) -> Any:
        """Undo what was done since the savepoint."""

    def leave_savepoint(self) -> Any:
        """Forget the savepoint, before the caller commits. A connection has no need to: COMMIT does it."""


# libpq's PQtransactionStatus, which both drivers hand out as a number
_IDLE = 0
_INTRANS = 2


def rows_of(cursor: Any) -> list[Row]:
    """The rows that a cursor has, by the names of their columns; none where the statement returns none."""
    if cursor.description is None:
        return []
    return _named(cursor, cursor.fetchall())


def _named(cursor: Any, rows: list[Any]) -> list[Row]:
    names = [column.name for column in cursor.description]
    return [dict(zip(names, row)) for row in rows]


def _not_committed(error: Exception, lost: bool) -> NoReturn:
    """Say what an error of COMMIT means."""
    state = sqlstate_of(error)
    if lost or state is None:
        raise CommitUnknownError("the connection was lost during COMMIT", sqlstate=state) from error
    raise error


def _check_tag(tag: str | None) -> None:
    if tag != "COMMIT":
        raise RolledBackError("the transaction was rolled back: an error inside it had been swallowed")


class _DriverSession:
    """What connections of psycopg and psycopg2 have in common."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def is_lost(self) -> bool:
        return bool(self.connection.closed)

    def begin(self) -> None:
        if self.connection.autocommit:
            self._execute(_BEGIN)

    def fetch(self, statement: Statement) -> list[Row]:
        with self._execute(statement) as cursor:
            return rows_of(cursor)

    def set_savepoint(self) -> None:
        self._execute(_SAVEPOINT)

    def undo(self) -> None:
        self._execute(_UNDO)

    def leave_savepoint(self) -> None:
        pass

    def _execute(self, statement: Statement) -> Any:
        """Send a statement over a plain cursor, whatever the connection makes by default."""
        raise NotImplementedError


class Psycopg2Session(_DriverSession):
    """A connection of psycopg2."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        self._cursor = import_module("psycopg2.extensions").cursor

    def is_idle(self) -> bool:
        return bool(self.connection.get_transaction_status() == _IDLE)

    def begin(self) -> None:
        if not self.connection.autocommit:
            # psycopg2 may take one for open that the application has ended by a statement of its own
            self.connection.rollback()
        super().begin()

    def commit(self) -> None:
        if not self.is_lost() and self.connection.get_transaction_status() != _INTRANS:
            self.rollback()
            _check_tag(None)
        try:
            if self.connection.autocommit:
                tag = self._execute(_COMMIT).statusmessage
            else:
                self.connection.commit()
                tag = "COMMIT"
        except Exception as error:
            _not_committed(error, self.is_lost())
        _check_tag(tag)

    def rollback(self) -> None:
        if self.is_lost():
            return
        try:
            if not self.connection.autocommit:
                self.connection.rollback()
            elif not self.is_idle():
                self._execute(_ROLLBACK)
        except BaseException:
            self.connection.close()
            raise

    def _execute(self, statement: Statement) -> Any:
        cursor = self.connection.cursor(cursor_factory=self._cursor)
        cursor.execute(statement.text, statement.values)
        return cursor


class PsycopgSession(_DriverSession):
    """A connection of psycopg 3."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        self._row = import_module("psycopg.rows").tuple_row

    def is_idle(self) -> bool:
        return bool(self.connection.info.transaction_status == _IDLE)

    def begin(self) -> None:
        _refuse_pipeline(self.connection)
        super().begin()

    def commit(self) -> None:
        try:
            tag = self._execute(_COMMIT).statusmessage
        except Exception as error:
            _not_committed(error, self.is_lost())
        _check_tag(tag)

    def rollback(self) -> None:
        if self.is_lost() or self.is_idle():
            return
        try:
            self._execute(_ROLLBACK)
        except BaseException:
            self.connection.close()
            raise

    def _execute(self, statement: Statement) -> Any:
        return self.connection.cursor(row_factory=self._row).execute(statement.text, statement.values or None)


class AsyncPsycopgSession:
    """An asynchronous connection of psycopg 3."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._row = import_module("psycopg.rows").tuple_row

    def is_idle(self) -> bool:
        return bool(self.connection.info.transaction_status == _IDLE)

    def is_lost(self) -> bool:
        return bool(self.connection.closed)

    async def begin(self) -> None:
        _refuse_pipeline(self.connection)
        if self.connection.autocommit:
            await self._execute(_BEGIN)

    async def fetch(self, statement: Statement) -> list[Row]:
        async with await self._execute(statement) as cursor:
            return _named(cursor, await cursor.fetchall())

    async def commit(self) -> None:
        try:
            tag = (await self._execute(_COMMIT)).statusmessage
        except Exception as error:
            _not_committed(error, self.is_lost())
        _check_tag(tag)

    async def rollback(self) -> None:
        if self.is_lost() or self.is_idle():
            return
        try:
            await self._execute(_ROLLBACK)
        except BaseException:
            await self.connection.close()
            raise

    async def set_savepoint(self) -> None:
        await self._execute(_SAVEPOINT)

    async def undo(self) -> None:
        await self._execute(_UNDO)

    async def leave_savepoint(self) -> None:
        pass

    async def _execute(self, statement: Statement) -> Any:
        return await self.connection.cursor(row_factory=self._row).execute(statement.text, statement.values or None)


def _refuse_pipeline(connection: Any) -> None:
    """Raise OutOfOrderError in the pipeline mode of psycopg, where COMMIT has no answer when it returns."""
    if connection.info.pipeline_status:
        raise OutOfOrderError("the connection is in pipeline mode: leave that first")


def _classes(connection: Any) -> Iterator[str]:
    """The names of the classes of a connection that are of a driver or library, with the name of that."""
    for kind in type(connection).__mro__:
        yield f"{kind.__module__.split('.', 1)[0]}.{kind.__name__}"


def opens(connect: Any) -> bool:
    """Whether something opens connections, rather than being one."""
    # a scoped_session of SQLAlchemy can be called as well
    return callable(connect) and not hasattr(connect, "execute")


def session_of(connection: Any) -> Session:
    """
    A connection of psycopg or psycopg2, or a session of SQLAlchemy, as the flows use it.

    Raises TypeError for anything else.
    """
    for kind in _classes(connection):
        if kind == "psycopg2.connection":
            return Psycopg2Session(connection)
        if kind == "psycopg.Connection":
            return PsycopgSession(connection)
        if kind in ("sqlalchemy.Session", "sqlalchemy.scoped_session"):
            from .sqlalchemy import SqlAlchemySession

            return SqlAlchemySession(connection)
        if kind == "psycopg.AsyncConnection":
            raise TypeError("an asynchronous connection needs pg_idempotency.aio")
    raise TypeError(f"a connection of psycopg or psycopg2 is needed, not {type(connection).__name__}")


def async_session_of(connection: Any) -> Session:
    """An asynchronous connection of psycopg, as the flows use it. Raises TypeError for anything else."""
    if "psycopg.AsyncConnection" not in _classes(connection):
        raise TypeError(f"an asynchronous connection of psycopg is needed, not {type(connection).__name__}")
    return AsyncPsycopgSession(connection)
