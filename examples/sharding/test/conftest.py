"""Three shards, each a server of its own, and a proxy in the server of the environment.

A test has tenants of its own, and stops what it wants to look at by a lock on what that
needs next.  It sees in pg_stat_activity of the shard that it waits.

Where the server has no plproxy, the tests that need the proxy are skipped, and the head
of the report says so.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import namedtuple_row

EXAMPLE = Path(__file__).resolve().parent.parent
SERVER = os.environ["DATABASE_URL"]

# What a client repeats a request after: the tenant is moving, the shard does not answer
# or is going down, or has just come back; a deadlock, a serialization failure.
REPEAT = ("SHARD", "57P01", "57P02", "57P03", "40P01", "40001")


def has_plproxy():
    with psycopg.connect(SERVER) as connection:
        return connection.execute("SELECT FROM pg_available_extensions WHERE name = 'plproxy'").rowcount > 0


HAS_PLPROXY = has_plproxy()

TABLES = ("tenancy.tenants", "shop.accounts", "shop.payments", "shop.charges", "shop.deposits",
          "idempotency.idempotency_key")


def pytest_report_header():
    return [] if HAS_PLPROXY else ["the server has no plproxy: what needs the proxy is skipped"]


def until(condition, what, timeout=60):
    """Ask again and again until a condition holds, and return what it returned.

    The time is far more than it takes, so that no test depends on it.
    """
    end = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.02)
    return result


def load(url, file, **variables):
    """Run one of the example's files, as its head says."""
    subprocess.run(["psql", "-X", "-q", "-d", url, "-v", "ON_ERROR_STOP=1", "-f", EXAMPLE / file,
                    *(f"--set={name}={value}" for name, value in variables.items())],
                   check=True, timeout=60, env={**os.environ, "PGOPTIONS": "-c client_min_messages=warning"})


class Database:
    """A database, and what a test asks it as its superuser."""

    def __init__(self, url):
        self.url = url

    def connect(self, user="postgres"):
        # no test waits for a lock for so long, but one that has failed may have left one
        return psycopg.connect(make_conninfo(self.url, user=user, options="-c lock_timeout=60s"),
                               autocommit=True, row_factory=namedtuple_row)

    def query(self, statement, *values):
        """The rows of a statement, on a connection of its own, as the server may crash."""
        with self.connect() as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def value(self, statement, *values):
        return self.query(statement, *values)[0][0]

    def backends(self, condition):
        return [pid for pid, in self.query(f"SELECT pid FROM pg_stat_activity WHERE {condition}")]

    def waits(self, condition):
        """Wait until a backend of which this holds waits for a lock, and return its pid."""
        return until(lambda: self.backends(f"wait_event_type = 'Lock' AND {condition}"),
                     f"a backend to wait for a lock: {condition}")[0]

    @contextmanager
    def locked(self, statement, *values):
        """A transaction that has executed a statement, until the block ends or the server crashes."""
        connection = self.connect()
        connection.execute("BEGIN")
        connection.execute(statement, values)
        try:
            yield
        finally:
            connection.close()


class Shard(Database):
    """A server of its own, which can be crashed."""

    def __init__(self, folder, number):
        self.number = number
        self.data = folder / f"shard{number}"
        self.log = folder / f"shard{number}.log"
        self.conninfo = make_conninfo(host=str(folder), port=5432 + number, dbname="shop")
        super().__init__(make_conninfo(self.conninfo, user="postgres"))

        self.run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as conf:
            conf.write(f"""
                listen_addresses = ''
                unix_socket_directories = '{folder}'
                port = {5432 + number}
                shared_preload_libraries = 'idempotency'
                shared_buffers = '16MB'
                fsync = off
            """)
        self.start()
        with psycopg.connect(make_conninfo(self.url, dbname="postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE shop")
        self.query("CREATE SCHEMA idempotency")
        self.query("CREATE EXTENSION idempotency SCHEMA idempotency")
        load(self.url, "shard.sql")

    def run(self, program, *arguments):
        subprocess.run([program, *arguments], check=True, timeout=120, stdout=subprocess.DEVNULL,
                       env={**os.environ, "PGDATA": str(self.data)})

    def start(self):
        self.run("pg_ctl", "-w", "-s", "-l", str(self.log), "start")

    def crash(self):
        """Stop it without a checkpoint, as the loss of its machine does."""
        self.run("pg_ctl", "-w", "-s", "-m", "immediate", "stop")

    def recovered(self):
        """Wait until it takes connections again, after it has crashed by itself."""
        def answers():
            try:
                return self.value("SELECT true")
            except psycopg.OperationalError:
                return False
        until(answers, f"shard {self.number} to recover")

    def serves(self, tenant):
        return self.query("SELECT tenant FROM tenancy.tenants WHERE tenant = %s AND leaving_by IS NULL",
                          tenant) != []

    def counts(self, tenant):
        """How many rows a tenant has, by table: those that have any."""
        counting = " UNION ALL ".join(
            f"SELECT '{table}', count(*) FROM {table} WHERE tenant = %(tenant)s HAVING count(*) > 0"
            for table in TABLES)
        with self.connect() as connection:
            return dict(connection.execute(counting, {"tenant": tenant}).fetchall())


@pytest.fixture(scope="session")
def shards():
    """The three shards; a socket's path must be short, so they are not in pytest's own folder."""
    folder = Path(tempfile.mkdtemp(prefix="shards"))
    started = []
    try:
        for number in range(3):
            started.append(Shard(folder, number))
        yield started
    finally:
        for shard in started:
            shard.crash()
        shutil.rmtree(folder)


class Proxy(Database):
    """The proxy, and what the application asks it."""

    def call(self, function, *arguments):
        """The answer to one request, on a connection of its own."""
        with self.connect("shop_app") as connection:
            return call(connection, function, *arguments)

    def pay(self, tenant, key, amount=1, account="alice"):
        return self.call("pay", tenant, key, f'{{"account": "{account}", "amount": {amount}}}')

    def shard_of(self, tenant):
        return self.value("SELECT routing.shard_of(%s)", tenant)


class Client:
    """One that repeats a request as often as it takes, on a connection that it keeps."""

    def __init__(self, proxy):
        self.connection = proxy.connect("shop_app")

    def pay(self, tenant, key):
        while True:
            try:
                answer = call(self.connection, "pay", tenant, key, '{"account": "alice", "amount": 1}')
                if answer.outcome != "in_flight":
                    return answer
            except psycopg.Error as error:
                if error.sqlstate not in REPEAT and not cannot_reach_shard(error):
                    raise
            time.sleep(0.02)


def cannot_reach_shard(error):
    """PL/Proxy has no SQLSTATE of its own for a lost or refused connection."""
    return error.sqlstate == "XX000" and any(text in str(error) for text in (
        "PQconnectPoll", "PQconnectStart", "PQconsumeInput", "PQflush", "PQsendQueryParams",
        "server closed the connection", "the database system is"))


def call(connection, function, *arguments):
    places = ", ".join(["%s"] * len(arguments))
    return connection.execute(f"SELECT * FROM api.{function}({places})", arguments).fetchone()


@pytest.fixture(scope="session")
def proxy(shards):
    if not HAS_PLPROXY:
        pytest.skip("the server has no plproxy")
    name = f"proxy_{os.getpid()}"
    database = Proxy(make_conninfo(SERVER, dbname=name))
    with psycopg.connect(SERVER, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            load(database.url, "proxy.sql", **{f"shard{shard.number}": shard.conninfo for shard in shards})
            yield database
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def client(proxy):
    """A function that makes a client."""
    clients = []

    def start():
        clients.append(Client(proxy))
        return clients[-1]

    yield start
    for client in clients:
        client.connection.close()


class Tenant:
    """A tenant whose account alice has plenty of money."""

    def __init__(self, proxy, shards, name):
        self.name = name
        self.shards = shards
        proxy.query("CALL routing.create_tenant(%s)", name)
        self.shard = shards[proxy.shard_of(name)]
        self.other = shards[(self.shard.number + 1) % 3]
        self.shard.query("INSERT INTO shop.accounts VALUES (%s, 'alice', 1000000)", name)

    def payments(self):
        """What was paid, wherever it is."""
        return sorted(amount for shard in self.shards for amount, in shard.query(
            "SELECT amount FROM shop.payments WHERE tenant = %s", self.name))

    def holds_alice(self):
        """A lock that a payment waits for, in its handler."""
        return self.shard.locked("SELECT FROM shop.accounts WHERE tenant = %s AND id = 'alice' FOR UPDATE",
                                 self.name)


PAYS = "query LIKE '%%api.pay(%%'"


@pytest.fixture
def tenant(proxy, shards):
    """A new one."""
    return Tenant(proxy, shards, f"tenant-{uuid.uuid4()}")


@pytest.fixture
def threads():
    """What runs beside the test, and is over when the test is."""
    with ThreadPoolExecutor(20) as pool:
        yield pool


class Mover:
    """A move-tenant at work."""

    def __init__(self, proxy, tenant, shard):
        self.proxy = proxy
        self.process = subprocess.Popen(
            [sys.executable, "-B", EXAMPLE / "move-tenant", tenant, str(shard.number)],
            env={**os.environ, "DATABASE_URL": proxy.url},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def ends(self, status=0):
        """Wait for its end, and return what it has said."""
        said, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == status, said
        return said


@pytest.fixture
def move(proxy):
    """A function that starts to move a tenant."""
    movers = []

    def start(tenant, shard):
        movers.append(Mover(proxy, tenant, shard))
        return movers[-1]

    yield start
    for mover in movers:
        mover.kill()
