"""A database with the API for all tests, and what they ask it with.

The server is the one that the environment names; scripts/with-server starts one.
Where there is a `postgrest` in PATH the requests go through it; else they are made
by the settings that it would make.  The head of the report says which.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import uuid

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import psycopg
import pytest
from psycopg import sql

from by_http import EXAMPLE, ByHttp
from by_settings import BySettings
from world import make_account

ByEither = ByHttp if shutil.which("postgrest") else BySettings


def pytest_report_header():
    return f"requests are made by {ByEither.name}"


class Database:
    """A database to which anybody can be connected."""

    def __init__(self, name):
        self.name = name

    def parameters(self, user="postgres"):
        """What a client needs to log in, beside the environment."""
        return {"host": os.environ["PGHOST"], "port": os.environ["PGPORT"], "dbname": self.name, "user": user}

    def connect(self, user="postgres"):
        return psycopg.connect(**self.parameters(user), autocommit=True)

    def load(self):
        """Put the API into it."""
        url = psycopg.conninfo.make_conninfo(**self.parameters())
        subprocess.run([EXAMPLE / "load", url], check=True, timeout=60)


@pytest.fixture(scope="session")
def server():
    """A connection of a superuser to the server's own database."""
    with psycopg.connect(dbname="postgres", user="postgres", autocommit=True) as connection:
        yield connection


@contextlib.contextmanager
def new_database(server, name):
    """A database for as long as it is needed."""
    server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield Database(name)
    finally:
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def database(server):
    """The database with the API and the scenarios of the tests."""
    with new_database(server, f"rpc_{os.getpid()}") as found:
        found.load()
        with found.connect() as connection:
            connection.execute((EXAMPLE / "test" / "scenarios.sql").read_text())
        yield found
    server.execute("DROP ROLE serializable_user, impatient_user, patient_user, acme_user, acme_authenticator")


@pytest.fixture(scope="session")
def api(database):
    """The API, as those see it whose log-in is known to the authenticator."""
    asked = ByEither(database.parameters("authenticator"))
    yield asked
    asked.close()


@pytest.fixture
def admin(database):
    """A connection of a superuser, who sees the rows of all tenants."""
    with database.connect() as connection:
        yield connection


@pytest.fixture
def key():
    """A key that nobody has used."""
    return str(uuid.uuid4())


@pytest.fixture
def account(admin):
    """A new account of the tenant acme, with 100."""
    return make_account(admin)
