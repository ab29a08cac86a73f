"""
Databases for tests, and the end of their server.

DATABASE_URL is the server, PGDATA its folder. A new database has the extension, as the template has it.
"""

import os
import signal
import subprocess
import time
import uuid
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg2
from api import PATIENCE
from psycopg2.extensions import make_dsn

SERVER = os.environ["DATABASE_URL"]


def until(condition, what):
    """Ask again and again until a condition holds, and return what it returned."""
    end = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.02)
    return result


class Database:
    """A database of its own for some tests."""

    def __init__(self):
        self._name = f"payments_{uuid.uuid4().hex}"
        self.url = make_dsn(SERVER, dbname=self._name)
        _execute(SERVER, f"CREATE DATABASE {self._name}")

    def drop(self):
        """Remove it, whoever still uses it."""
        _execute(SERVER, f"DROP DATABASE IF EXISTS {self._name} WITH (FORCE)")

    def query(self, statement, *values):
        """The rows of a statement, on a connection of its own, as the server may crash."""
        return _execute(self.url, statement, values)

    def value(self, statement, *values):
        """The only value of the only row."""
        ((value,),) = self.query(statement, *values)
        return value

    def records(self, key):
        """The records of a key: action, tenant, actor, state and status."""
        return self.query(
            "SELECT action, tenant, actor, state::text, status_code FROM idempotency.idempotency_key"
            " WHERE key = %s ORDER BY 1, 2, 3",
            key,
        )

    def everything(self):
        """All rows of the service and all records, to be compared with what is there later."""
        return {
            table: self.query(f"SELECT t::text FROM {table} AS t ORDER BY 1")
            for table in (
                "payments_paymentbatch",
                "payments_paymentrequest",
                "payments_approvalrecord",
                "idempotency.idempotency_key",
            )
        }

    def others(self):
        """How many connections there are, besides the one that asks."""
        return self.value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()", self._name
        )

    def held(self, row_id):
        """Keep a batch or payment request locked in a block."""
        lock = "SELECT 1 FROM {} WHERE id = '{}' FOR UPDATE"
        tables = ("payments_paymentbatch", "payments_paymentrequest")
        return self.transaction(*(lock.format(table, row_id) for table in tables))

    @contextmanager
    def transaction(self, *statements):
        """Have some statements done in a transaction that is open for a block, and rolled back."""
        with closing(psycopg2.connect(self.url)) as connection:
            for statement in statements:
                connection.cursor().execute(statement)
            yield

    def waits(self, count=1):
        """Wait until this many transactions wait for a lock."""
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
        until(lambda: self.value(waiting, self._name) == count, f"{count} transactions to wait")


def _execute(url, statement, values=()):
    connection = psycopg2.connect(url)
    connection.autocommit = True
    with closing(connection), connection.cursor() as cursor:
        cursor.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []


def restart_server():
    """Kill the whole server as a loss of power does, every process of it, and start it again."""
    folder = Path(os.environ["PGDATA"]).resolve()
    postmaster = int((folder / "postmaster.pid").read_text().split()[0])

    def gone():
        # the first one first, lest it start others in place of those killed
        left = sorted(_processes_in(folder), key=lambda process: process != postmaster)
        for process in left:
            _kill(process, signal.SIGKILL)
        # while the system knows its number, the next one would not take its place
        return not left and not _kill(postmaster, 0)

    until(gone, "the server to be gone")
    subprocess.run(["pg_ctl", "start", "-D", folder, "-w", "-s", "-t", "300", "-l", f"{folder}.log"], check=True)


def _processes_in(folder):
    """The processes that work in a folder, as all of a server do in its own."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == str(folder):
                yield int(process.name)
        except OSError:
            pass


def _kill(process, number):
    """Send a signal, and return whether there was such a process."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True
