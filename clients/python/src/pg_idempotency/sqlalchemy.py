"""
Sessions of SQLAlchemy, over psycopg or psycopg2. ``idempotent``, ``run`` and ``lease`` take them as they do
connections.

Objects that are pending in a session are flushed before the answer is kept, since what the flush at COMMIT
would send comes after it. To undo the work goes through the session as well, so that it forgets what was
rolled back.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ._connections import Row
from ._statements import Statement
from .errors import CommitUnknownError, sqlstate_of


class SqlAlchemySession:
    """A ``Session`` of SQLAlchemy, or a ``scoped_session``, as the flows use it."""

    def __init__(self, session: Any) -> None:
        self.connection = session
        # of a scoped_session, the one of this thread
        self._session = session if hasattr(session, "in_transaction") else session()
        self._lost = False
        self._savepoint: Any = None

    def is_idle(self) -> bool:
        return not self._session.in_transaction()

    def is_lost(self) -> bool:
        return self._lost

    def begin(self) -> None:
        self._session.begin()

    def fetch(self, statement: Statement) -> list[Row]:
        try:
            self._session.flush()
            result = self._session.connection().exec_driver_sql(statement.text, statement.values)
            return [dict(row) for row in result.mappings()]
        except Exception as error:
            self._note(error)

    def commit(self) -> None:
        try:
            self._session.commit()
        except Exception as error:
            if getattr(error, "connection_invalidated", False):
                self._lost = True
                state = sqlstate_of(error)
                raise CommitUnknownError("the connection was lost during COMMIT", sqlstate=state) from error
            raise

    def rollback(self) -> None:
        self._session.rollback()

    def set_savepoint(self) -> None:
        self._savepoint = self._session.begin_nested()

    def undo(self) -> None:
        self._savepoint.rollback()

    def leave_savepoint(self) -> None:
        # commit() of SQLAlchemy 1.4 would end the savepoint, if it is in progress, and commit nothing
        if self._savepoint.is_active:
            self._savepoint.commit()

    def _note(self, error: Exception) -> NoReturn:
        """Remember that the connection is lost, if that is what an error says."""
        self._lost = self._lost or getattr(error, "connection_invalidated", False)
        raise error
