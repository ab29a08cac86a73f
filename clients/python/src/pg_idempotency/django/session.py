"""
A database of Django, as the flows of the core use a connection.

A transaction is an ``atomic`` block that is entered and left by hand, so that all that Django knows about
transactions stays true: hooks of ``on_commit``, savepoints of blocks inside, and a connection that can be
used afterwards whatever became of this one.

What has to be found out beside:

- ``atomic`` does not commit inside of another block. A durable one refuses that, but inside of a
  ``TestCase``, where all is rolled back in the end anyway.
- ``atomic`` rolls back without a word when somebody has asked for it or a statement had failed.
- Django runs the hooks of ``on_commit`` as a part of leaving the block. An error of theirs comes after
  COMMIT has taken effect.
- When a connection is lost, Django closes it as it leaves the block, and may have another one by the time
  that the error comes out. So whether it is lost is asked of the driver's connection that the transaction
  was begun on.
"""

from __future__ import annotations

from typing import Any

from django.db import connections, transaction

from .._connections import Row, Session, rows_of
from .._statements import Statement
from ..errors import CommitUnknownError, OutOfOrderError, RolledBackError, sqlstate_of

#: libpq's PQtransactionStatus for a transaction in which no statement has failed
_INTRANS = 2


class _Undo(Exception):
    """Leaves an ``atomic`` block so that it is rolled back."""


class DjangoSession(Session):
    """
    The transactions of one request.

    using: the alias of the database.
    nested: whether they are savepoints in the transaction of a ``TestCase``.
    """

    def __init__(self, using: str) -> None:
        self.connection = connections[using]
        self.nested = self.connection.in_atomic_block
        self._using = using
        self._atomic: Any = None
        self._savepoint: Any = None
        self._raw: Any = self.connection.connection
        self._committed = False
        self._error_of_hook: Exception | None = None

    def is_idle(self) -> bool:
        """Whether no transaction was begun here; Django itself tells whether there is another."""
        return self._atomic is None

    def is_lost(self) -> bool:
        """Whether the connection has turned out to be closed, or could not be opened."""
        return self._raw is None or bool(self._raw.closed)

    def begin(self) -> None:
        """Begin a transaction. Raises OutOfOrderError where it could not be committed."""
        self._raw = None
        self._committed = False
        if not self.nested and not self.connection.get_autocommit():
            raise OutOfOrderError("autocommit is off, so Django would not commit: protected views need it on")
        atomic = transaction.atomic(using=self._using, durable=True)
        try:
            atomic.__enter__()
        except RuntimeError as error:
            raise OutOfOrderError(
                "a transaction is open, so the answer would leave before it is committed: call the view outside "
                "of atomic(). With ATOMIC_REQUESTS, IdempotencyMiddleware has to be in MIDDLEWARE"
            ) from error
        self._atomic = atomic
        self._raw = self.connection.connection
        if not self.nested:
            transaction.on_commit(self._was_committed, using=self._using)

    def _was_committed(self) -> None:
        self._committed = True

    def fetch(self, statement: Statement) -> list[Row]:
        """Send a statement, and return its rows."""
        with self.connection.cursor() as cursor:
            cursor.execute(statement.text, statement.values)
            return rows_of(cursor)

    def commit(self) -> None:
        """Commit. Raises RolledBackError if that cannot take effect, CommitUnknownError if nobody knows."""
        self.must_be_whole()
        atomic, self._atomic = self._atomic, None
        try:
            atomic.__exit__(None, None, None)
        except Exception as error:
            if self._committed:
                self._error_of_hook = error
                return
            state = sqlstate_of(error)
            if self.is_lost() or state is None:
                raise CommitUnknownError("the connection was lost during COMMIT", sqlstate=state) from error
            raise

    def raise_error_of_hook(self) -> None:
        """Raise what a hook of ``on_commit`` has raised, after COMMIT had taken effect."""
        if self._error_of_hook is not None:
            raise self._error_of_hook

    def must_be_whole(self) -> None:
        """Raise RolledBackError if the transaction can only be rolled back."""
        failed = not self.is_lost() and self._raw.info.transaction_status != _INTRANS
        if failed or self.connection.needs_rollback:
            raise RolledBackError(
                "the transaction can only be rolled back: an error inside it was swallowed, or set_rollback was called"
            )

    def rollback(self) -> None:
        """Roll back what was begun here, if anything is."""
        atomic, self._atomic = self._atomic, None
        if atomic is not None:
            undo = _Undo()
            atomic.__exit__(_Undo, undo, None)

    def set_savepoint(self) -> None:
        """Set a savepoint in the transaction of the caller. Raises OutOfOrderError if there is none."""
        if not self.connection.in_atomic_block:
            raise OutOfOrderError("with commit=False, this has to be inside of atomic()")
        self._savepoint = transaction.savepoint(using=self._using)

    def undo(self) -> None:
        """Undo what was done since the savepoint, an error that Django has marked the transaction for included."""
        self.connection.needs_rollback = False
        transaction.savepoint_rollback(self._savepoint, using=self._using)

    def leave_savepoint(self) -> None:
        """Nothing is to be done: COMMIT ends it."""
