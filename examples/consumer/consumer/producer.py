"""A producer that delivers messages, some of them more than once.

    DATABASE_URL=... python3 -m consumer.producer --messages 6000 --deliveries 10000

A real one has the same id for a message however often it sends it: that of its
outbox, or `idempotency_event_key` of the event.
"""

import argparse
import os
import random
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

ACCOUNTS = ("alice", "bob", "carol")


def publish(connection: psycopg.Connection, messages: Iterable[tuple[str, Any]]) -> None:
    """Deliver messages, given by id and payload, to each consumer.

    The same message given again is delivered again.  `connection` may be in a
    transaction, which the deliveries are part of then.
    """
    consumers = [name for name, in connection.execute("SELECT name FROM queue.consumers")]
    with connection.cursor().copy(
            "COPY queue.deliveries (consumer, message_id, payload) FROM STDIN") as copy:
        for message_id, payload in messages:
            for consumer in consumers:
                copy.write_row((consumer, message_id, Jsonb(payload)))


def payments(count: int, deliveries: int,
             accounts: Sequence[str] = ACCOUNTS) -> list[tuple[str, Any]]:
    """`deliveries` of `count` messages, each at least once, in any order."""
    messages = [(str(uuid.uuid4()), {"order": str(number), "account": random.choice(accounts),
                                     "amount": random.randint(1, 100)})
                for number in range(count)]
    repeats = random.choices(messages, k=deliveries - count)
    return random.sample(messages + repeats, k=deliveries)


def main() -> None:
    """Open the accounts, and publish payments."""
    parser = argparse.ArgumentParser(prog="consumer.producer", description="Publish messages.")
    parser.add_argument("--messages", type=int, default=6000)
    parser.add_argument("--deliveries", type=int, default=10000)
    arguments = parser.parse_args()
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        for account in ACCOUNTS:
            connection.execute("INSERT INTO accounts VALUES (%s) ON CONFLICT DO NOTHING", [account])
        publish(connection, payments(arguments.messages, arguments.deliveries))


if __name__ == "__main__":
    main()
