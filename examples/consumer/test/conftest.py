"""Databases and workers for the tests, and ways to stop a worker where a test wants it.

Nothing in the worker knows of tests.  A test stops it from outside, by a lock in the
database on what the worker needs next, and sees in pg_stat_activity that it waits.
"""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

EXAMPLE = Path(__file__).resolve().parent.parent
SERVER = os.environ["DATABASE_URL"]

sys.path.insert(0, str(EXAMPLE))

from consumer.producer import publish  # noqa: E402


def until(condition, what, timeout=60):
    """Ask again and again until a condition holds, and return what it returned.

    The time is far more than it takes, so that no test depends on it.
    """
    end = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.02)
    return result


class Lock:
    """A transaction that holds a lock until it is released."""

    def __init__(self, url, statement):
        self.connection = psycopg.connect(url)
        self.connection.execute(statement)

    def release(self, *statements):
        """Do something more, and commit."""
        for statement in statements:
            self.connection.execute(statement)
        self.connection.commit()
        self.connection.close()


class Database:
    """A database with the tables of the example, and the accounts alice and bob."""

    def __init__(self):
        self.name = f"consumer_{uuid.uuid4().hex}"
        self.url = make_conninfo(SERVER, dbname=self.name)
        self.worker_url = make_conninfo(self.url, user="consumer")
        self.locks = []
        with psycopg.connect(SERVER, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {self.name}")
        self.query((EXAMPLE / "schema.sql").read_text())
        self.query("INSERT INTO accounts VALUES ('alice'), ('bob')")

    def drop(self):
        for lock in self.locks:
            lock.connection.close()
        with psycopg.connect(SERVER, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {self.name} WITH (FORCE)")

    def query(self, statement, *values):
        """The rows of a statement, on a connection of its own, as the server may crash."""
        with psycopg.connect(self.url) as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def value(self, statement, *values):
        return self.query(statement, *values)[0][0]

    def deliver(self, messages):
        """Deliver messages, ids and payloads, to accounting alone."""
        self.query("DELETE FROM queue.consumers WHERE name = 'shipping'")
        with psycopg.connect(self.url) as connection:
            publish(connection, messages)

    def publish(self, *messages):
        """The same for ids, accounts and amounts."""
        self.deliver([(message_id, {"order": "1", "account": account, "amount": amount})
                      for message_id, account, amount in messages])

    def lock(self, statement):
        self.locks.append(Lock(self.url, statement))
        return self.locks[-1]

    def effects(self):
        """The ids of what was done by accounting, as often as it was."""
        return [message_id for message_id, in
                self.query("SELECT message_id FROM ledger ORDER BY message_id")]

    def seen(self):
        """The ids that are remembered."""
        return [key for key, in
                self.query("SELECT key FROM idempotency.idempotency_key ORDER BY key")]

    def left(self):
        """How many deliveries are in the queue."""
        return self.value("SELECT count(*) FROM queue.deliveries")

    def reason(self, message_id):
        """Why the deliveries of a message were rejected the last time."""
        return self.value("SELECT coalesce(string_agg(reason, ', '), '') FROM queue.deliveries"
                          " WHERE message_id = %s", message_id)

    def drained(self):
        until(lambda: self.left() == 0, "the queue to be empty")

    def dead_letters(self):
        return self.query("""SELECT message_id, attempts, split_part(reason, E'\n', 1)
                               FROM queue.dead_letters ORDER BY id""")

    def pass_time(self):
        """Make all deliveries visible again, as time would."""
        self.query("UPDATE queue.deliveries SET visible_at = now()")


class Worker:
    """A worker process, which sees its deliveries come again when a test lets time pass."""

    def __init__(self, database, consumer, options):
        self.database = database
        arguments = {"visibility": 3600, "delay": 0, **options}
        self.process = subprocess.Popen(
            [sys.executable, "-B", "-m", "consumer.worker", consumer,
             *(f"--{name}={value}" for name, value in arguments.items())],
            cwd=EXAMPLE, env={**os.environ, "DATABASE_URL": database.worker_url})
        self.name = f"{consumer} worker {self.process.pid}"

    def backends(self, condition="true"):
        """The processes of the server that work for this one."""
        return [pid for pid, in self.database.query(
            f"SELECT pid FROM pg_stat_activity WHERE application_name = %s AND {condition}",
            self.name)]

    def waits(self, statement):
        """Wait until it waits for a lock, in a statement like this."""
        until(lambda: self.backends(f"wait_event_type = 'Lock' AND query LIKE '%%{statement}%%'"),
              f"{self.name} to wait in {statement}")

    def asks(self):
        """Wait until it has asked the queue."""
        until(lambda: self.backends("query LIKE '%%SKIP LOCKED%%'"), f"{self.name} to ask")

    def terminate_backend(self):
        """Cut its connection."""
        self.database.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                            " WHERE application_name = %s", self.name)

    def kill(self):
        """Kill it, with nothing of it left in the server that does not wait for a lock."""
        self.process.kill()
        self.process.wait()

    def vanish(self):
        """Kill it together with its connection, as the loss of its machine does."""
        self.kill()
        self.terminate_backend()
        until(lambda: not self.backends(), f"{self.name} to be gone from the server")

    def stop(self, number):
        """Send a signal that stops it, and return its status when it has stopped."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@pytest.fixture
def database():
    database = Database()
    yield database
    database.drop()


@pytest.fixture
def start(database):
    """A function that starts a worker."""
    workers = []

    def start(consumer="accounting", **options):
        workers.append(Worker(database, consumer, options))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()
