"""A queue that delivers at least once, kept in a table.

It has what other queues have.  A delivery that was handed out is invisible for a
time, and comes back unless it is acknowledged before that time is over: nothing
but this tells the queue that a worker has died.  A delivery that was handed out
often enough goes to the dead letters instead.

It also does what can be done with any queue that counts how often it has handed
out a delivery: one that comes back comes alone.  Whatever went wrong, a message
may be the cause, and if that message kills its worker, or makes the whole
transaction fail at COMMIT, it must not take the same neighbours with it each time
until all of them are dead letters.

Every call is one short transaction of its own, and no lock outlives it.  SKIP
LOCKED lets two workers that ask at the same moment pass each other by.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg
from psycopg.rows import class_row


@dataclass(frozen=True)
class Delivery:
    """A delivery of a message, which may have others."""

    id: int
    message_id: str
    payload: Any


class Queue:
    """The deliveries of one consumer.

    `connection` is in autocommit mode, and in no transaction when a method is
    called.  `visibility` is for how long a delivery that was handed out is invisible,
    `attempts` how often it is handed out at most.  Each method raises `psycopg.Error`,
    and then has done nothing, or not said that it has: call it again, or leave it to
    the queue to deliver again.
    """

    def __init__(self, connection: psycopg.Connection, consumer: str, *,
                 visibility: timedelta, attempts: int):
        self._connection = connection
        self._values = {"consumer": consumer, "visibility": visibility, "attempts": attempts}
        self._new_ones_first = False

    def receive(self, limit: int) -> list[Delivery]:
        """Take one delivery that came before, or up to `limit` others.

        The two take turns, so that neither keeps the other waiting.
        """
        self._bury()
        self._new_ones_first = not self._new_ones_first
        if self._new_ones_first:
            return self._take("attempts = 0", limit) or self._take("attempts > 0", 1)
        return self._take("attempts > 0", 1) or self._take("attempts = 0", limit)

    def acknowledge(self, deliveries: list[Delivery]) -> None:
        """Have deliveries never come again: all that they ask for is committed.

        That is true whoever has them by now, so it is not asked.
        """
        self._connection.execute("DELETE FROM queue.deliveries WHERE id = ANY (%s)",
                                 [[delivery.id for delivery in deliveries]])

    def reject(self, delivery: Delivery, reason: str, delay: timedelta) -> None:
        """Have a delivery come again after `delay`.

        If somebody else has it by now, it may come again too early, which does no harm.
        """
        self._connection.execute(
            """UPDATE queue.deliveries SET visible_at = now() + %s, reason = %s
                WHERE id = %s""", [delay, reason, delivery.id])

    def _take(self, condition: str, limit: int) -> list[Delivery]:
        cursor = self._connection.cursor(row_factory=class_row(Delivery))
        return cursor.execute(
            f"""WITH due AS (
                    SELECT id FROM queue.deliveries
                     WHERE consumer = %(consumer)s AND visible_at <= now() AND {condition}
                     ORDER BY visible_at
                     LIMIT %(limit)s
                       FOR UPDATE SKIP LOCKED)
                UPDATE queue.deliveries
                   SET attempts = attempts + 1, visible_at = now() + %(visibility)s
                  FROM due
                 WHERE deliveries.id = due.id
                RETURNING deliveries.id, message_id, payload""",
            {**self._values, "limit": limit}).fetchall()

    def _bury(self) -> None:
        self._connection.execute(
            """WITH spent AS (
                   DELETE FROM queue.deliveries
                    WHERE id IN (
                        SELECT id FROM queue.deliveries
                         WHERE consumer = %(consumer)s AND visible_at <= now()
                           AND attempts > 0 AND attempts >= %(attempts)s
                           FOR UPDATE SKIP LOCKED)
                   RETURNING id, consumer, message_id, payload, attempts, reason)
               INSERT INTO queue.dead_letters (id, consumer, message_id, payload, attempts, reason)
               SELECT * FROM spent""", self._values)
