"""Who sends requests in the tests, and what the database has afterwards.

Each function takes a connection of a superuser, who sees the rows of all tenants.
"""

import contextlib
import uuid

from api import until

ALICE = {"role": "web_user", "tenant": "acme", "sub": "alice"}
BOB = {"role": "web_user", "tenant": "acme", "sub": "bob"}
STRANGER = {"role": "web_user", "tenant": "other", "sub": "alice"}


def make_account(admin, tenant="acme"):
    """A new account with 100; its name."""
    name = f"account-{uuid.uuid4()}"
    admin.execute("INSERT INTO private.accounts VALUES (%s, %s, 100)", [tenant, name])
    return name


def balance(admin, account):
    return admin.execute("SELECT balance FROM private.accounts WHERE id = %s", [account]).fetchone()[0]


def payments(admin, account):
    """How many payments of an account there are."""
    return admin.execute("SELECT count(*) FROM private.payments WHERE account = %s", [account]).fetchone()[0]


def runs(admin, key):
    """How many times the handler of the scenarios ran for this key and was committed."""
    return admin.execute("SELECT count(*) FROM private.runs WHERE key = %s", [key]).fetchone()[0]


def records(admin, key):
    """The records of this key, as state and status."""
    return admin.execute(
        "SELECT state::text, status_code FROM idempotency.idempotency_key WHERE key = %s", [key]).fetchall()


@contextlib.contextmanager
def held(database, account):
    """Hold the row of an account, so that whoever pays from it waits; gives the connection that holds it."""
    with database.connect() as holder, holder.transaction():
        holder.execute("SELECT FROM private.accounts WHERE id = %s FOR UPDATE", [account])
        yield holder


def waiting_for(admin, holder):
    """The process that waits for a lock of this connection, as soon as there is one."""
    found = "SELECT pid FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
    pid = [holder.info.backend_pid]
    until(lambda: admin.execute(found, pid).fetchone(), "a process waits for the lock")
    return admin.execute(found, pid).fetchone()[0]
