"""A transaction that is surely committed when its block has ended.

psycopg's own `connection.transaction()` is silent when COMMIT is answered with a
rollback, as it is when an error of the database was swallowed in its block.  Here
that would be the loss of messages: they would be acknowledged, and nothing be done.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psycopg
from pg_idempotency import RolledBackError
from psycopg.pq import TransactionStatus


@contextmanager
def transaction(connection: psycopg.Connection, patience: timedelta) -> Iterator[None]:
    """Run the block in a transaction, and commit it.

    `connection` is in autocommit mode and in no transaction.  `patience` is how long
    the server lets the transaction do nothing before it ends it, together with the
    connection.

    Raises what the block raises, after a rollback; what COMMIT raises; and
    `RolledBackError`.  If the connection is lost during COMMIT, it is unknown whether
    it took effect.
    """
    connection.execute("BEGIN")
    try:
        connection.execute("SELECT set_config('idle_in_transaction_session_timeout', %s, true)",
                           [f"{patience / timedelta(milliseconds=1):.0f}"])
        yield
        tag = connection.execute("COMMIT").statusmessage
    except BaseException:
        if connection.info.transaction_status in (TransactionStatus.INTRANS,
                                                  TransactionStatus.INERROR):
            connection.execute("ROLLBACK")
        raise
    if tag != "COMMIT":
        raise RolledBackError(f"COMMIT was answered with {tag}")
