"""What the consumers do about a message.

A function gets the connection, inside the transaction that has recorded the id of
the message, and inside a savepoint.  It raises if the message cannot be worked on:
what it has written is rolled back then, and the message comes again.  It must not
commit, roll back, or swallow an error of the database; and effects outside of the
database would not be rolled back, so they are not for here.

A message says that an order was paid: {"order": "77", "account": "alice", "amount": 30}.
"""

from collections.abc import Callable

import psycopg

from .queue import Delivery

Work = Callable[[psycopg.Connection, Delivery], None]


def post_payment(connection: psycopg.Connection, delivery: Delivery) -> None:
    """Post a payment.

    Fails for an account that is not there, which may come later, and for an amount
    that is not above zero, which never works.
    """
    payment = delivery.payload
    connection.execute("INSERT INTO ledger (message_id, account, amount) VALUES (%s, %s, %s)",
                       [delivery.message_id, payment["account"], payment["amount"]])


def pack_parcel(connection: psycopg.Connection, delivery: Delivery) -> None:
    """Pack the parcel of an order."""
    connection.execute("INSERT INTO parcels (message_id, order_no) VALUES (%s, %s)",
                       [delivery.message_id, delivery.payload["order"]])


WORK: dict[str, Work] = {"accounting": post_payment, "shipping": pack_parcel}
