"""The transaction in which a batch of deliveries is worked on.

    BEGIN
    first_seen(ids of the batch)        records those that are new, and returns them
    for each that is new:
        SAVEPOINT; the work; RELEASE
        or, if the work fails: ROLLBACK TO; forget(id)
    COMMIT
    acknowledge, or reject what failed  another transaction, of another system

What is done about a message commits with the record of its id, or neither does.
So it does not matter how often the queue delivers a message, nor when a process
dies; the queue only has to deliver again what was not acknowledged.

Who holds what
    To take deliveries locks their rows for one statement; from then on they are
    invisible for a time, and nothing is locked.  first_seen locks nothing that has
    a name either: an id is recorded by inserting a row, and whoever inserts the
    same id waits for the end of the transaction that was first.  Besides these, a
    transaction holds what its work has locked.

The process dies before COMMIT, also in the middle of the work
    The server rolls back: no effect, no record.  The deliveries become visible
    again, and the ids are new to whoever gets them.  If the death is not noticed
    (the machine is gone, or the process was stopped), the transaction stays open,
    and whoever gets the deliveries waits for it in first_seen.  So the server
    is told to end a transaction that does nothing for as long as a delivery is
    invisible (idle_in_transaction_session_timeout).

It dies, or the connection is lost, during COMMIT
    Nobody knows what became of it, and nobody needs to.  Nothing is acknowledged,
    the deliveries come again, and first_seen tells.

It dies between COMMIT and the acknowledgement, or during that
    The deliveries come again, or do not.  If they do, the ids were seen: there is
    nothing to do but to acknowledge.

It is slow, and its deliveries become visible while it is at work
    Somebody else gets them and waits in first_seen.  When the first one commits, the
    ids were seen; when not, they are new.  That both acknowledge does no harm.

Two workers have deliveries of the same message
    The same: one of them waits, and is told that the id was seen, or that it is new,
    when it is known which is true.  So whoever acknowledges an id that was seen
    acknowledges what is committed.

Overlapping batches
    first_seen records ids in their own order and not in that of the batch, so two
    workers wait for each other in one direction only.  Two calls of it in one
    transaction would break this, so there is one for the batch.  The work may still
    deadlock with other work; then the whole transaction is run again.

A message fails
    Its id has been recorded already, with all of the batch, and would be taken for
    seen although nothing was done: the message would be lost.  So after the rollback
    to its savepoint the id is forgotten, in the same transaction.  A worker that
    waits for this id finds it new at our COMMIT, and tries in its turn.
    Only ids that this transaction has recorded are forgotten, never those that were
    seen: their effects are committed.
    The call takes a right that a worker's role should not have for everything that
    it could name; queue.forget in schema.sql is the narrow way.  Without it, roll
    back the transaction and run it again without the message.

Something fails that is not the message's own
    A deadlock or a serialization failure: the transaction is run again.  Anything
    else fails the batch, because it cannot be known whose fault it is: a constraint
    that is checked at COMMIT, an id that is malformed, or ID003 from forget, while
    an administrator forgets the same id.  The deliveries come again one by one, and
    then it is known.
"""

from datetime import timedelta

import psycopg
from pg_idempotency import first_seen, sqlstate_of
from psycopg.pq import TransactionStatus

from .queue import Delivery
from .transaction import transaction
from .work import Work

# How often the transaction of a batch is run at most
RUNS = 3

# Serialization failure and deadlock
RUN_AGAIN = ("40001", "40P01")


def consume(connection: psycopg.Connection, consumer: str, deliveries: list[Delivery],
            work: Work, *, remember: timedelta, patience: timedelta) -> dict[str, Exception]:
    """Do the work of each message that is new, once, in one transaction.

    `connection` is in autocommit mode and in no transaction.  `remember` is how long
    ids are remembered: longer than the queue may deliver a message again, and at
    most `idempotency.max_ttl`.  `patience` is how long the server lets the transaction
    do nothing.

    When it returns, the transaction is committed.  It returns why messages have
    failed, by their ids; all others can be acknowledged.  What it raises has failed
    the batch, and then nothing is committed, unless the connection was lost during
    COMMIT: none of the deliveries may be acknowledged.
    """
    for _ in range(RUNS - 1):
        try:
            return _consume_once(connection, consumer, deliveries, work, remember, patience)
        except Exception as error:
            if sqlstate_of(error) not in RUN_AGAIN:
                raise
    return _consume_once(connection, consumer, deliveries, work, remember, patience)


def _consume_once(connection: psycopg.Connection, consumer: str, deliveries: list[Delivery],
                  work: Work, remember: timedelta, patience: timedelta) -> dict[str, Exception]:
    by_message = {delivery.message_id: delivery for delivery in deliveries}
    failures: dict[str, Exception] = {}
    with transaction(connection, patience):
        for message_id in first_seen(connection, consumer, list(by_message), ttl=remember):
            failure = _try(connection, by_message[message_id], work)
            if failure is not None:
                failures[message_id] = failure
                connection.execute("SELECT queue.forget(%s, %s)", [consumer, message_id])
    return failures


def _try(connection: psycopg.Connection, delivery: Delivery, work: Work) -> Exception | None:
    """Do the work of a message in its own savepoint.

    Returns why it has failed, if that is its own affair; raises what fails the batch.
    """
    try:
        # psycopg's transaction() is a savepoint inside of another one
        with connection.transaction():
            work(connection, delivery)
            if connection.info.transaction_status != TransactionStatus.INTRANS:
                raise RuntimeError("the work has swallowed an error, or ended the transaction")
    except Exception as error:
        is_over = connection.info.transaction_status != TransactionStatus.INTRANS
        if is_over or sqlstate_of(error) in RUN_AGAIN:
            raise
        return error
    return None
