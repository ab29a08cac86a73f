"""The transaction of a batch, with work of the tests' own."""

from datetime import timedelta
from threading import Barrier, Event, Thread

import psycopg
import pytest
from pg_idempotency import RolledBackError

from consumer.batch import consume
from consumer.queue import Delivery
from consumer.transaction import transaction


def batch(*message_ids):
    return [Delivery(number, message_id, None) for number, message_id in enumerate(message_ids)]


def run(connection, deliveries, work):
    return consume(connection, "accounting", deliveries, work,
                   remember=timedelta(hours=1), patience=timedelta(minutes=1))


def post(connection, delivery):
    connection.execute("INSERT INTO ledger VALUES (%s, 'alice', 1)", [delivery.message_id])


@pytest.fixture
def connection(database):
    with psycopg.connect(database.worker_url, autocommit=True) as connection:
        yield connection


def test_error_that_the_work_swallows_fails_the_message(database, connection):
    def work(connection, delivery):
        post(connection, delivery)
        if delivery.message_id == "m2":
            try:
                connection.execute("SELECT 1 / 0")
            except psycopg.Error:
                pass

    failures = run(connection, batch("m1", "m2", "m3"), work)
    assert list(failures) == ["m2"]
    assert (database.effects(), database.seen()) == (["m1", "m3"], ["m1", "m3"])


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_work_that_ends_the_transaction_fails_the_batch(connection, end):
    def work(connection, delivery):
        post(connection, delivery)
        connection.execute(end)

    with pytest.raises(RuntimeError, match="ended the transaction"):
        run(connection, batch("m1", "m2"), work)


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_work_cannot_end_the_transaction_by_the_driver(database, connection, end):
    def work(connection, delivery):
        post(connection, delivery)
        getattr(connection, end)()

    assert list(run(connection, batch("m1", "m2"), work)) == ["m1", "m2"]
    assert (database.effects(), database.seen()) == ([], [])


def test_commit_that_was_a_rollback_is_an_error(database, connection):
    with pytest.raises(RolledBackError):
        with transaction(connection, timedelta(minutes=1)):
            post(connection, *batch("m1"))
            with pytest.raises(psycopg.Error):
                connection.execute("SELECT 1 / 0")
    assert database.effects() == []


def test_lost_connection_fails_the_batch(database, connection):
    def work(connection, delivery):
        post(connection, delivery)
        if delivery.message_id == "m2":
            connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(psycopg.OperationalError):
        run(connection, batch("m1", "m2"), work)
    assert connection.closed
    assert (database.effects(), database.seen()) == ([], [])


def test_other_locks_of_the_work_may_deadlock(database):
    """One of the two is told 40P01, and then all of its batch is run again."""
    both_have_one = Barrier(2)
    one_is_done = Event()
    runs = []
    failures = []
    database.query("GRANT SELECT, UPDATE ON accounts TO consumer")

    def work(connection, delivery):
        first, second = sorted(["alice", "bob"], reverse=delivery.message_id == "backward")
        is_again = delivery.message_id in runs
        runs.append(delivery.message_id)
        if is_again:
            assert one_is_done.wait(timeout=60)
        connection.execute("SELECT FROM accounts WHERE name = %s FOR UPDATE", [first])
        if not is_again:
            both_have_one.wait(timeout=60)
        connection.execute("SELECT FROM accounts WHERE name = %s FOR UPDATE", [second])
        post(connection, delivery)

    def run_alone(message_id):
        with psycopg.connect(database.worker_url, autocommit=True) as connection:
            failures.append(run(connection, batch(message_id), work))
        one_is_done.set()

    threads = [Thread(target=run_alone, args=[message_id])
               for message_id in ("forward", "backward")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [{}, {}]
    assert len(runs) == 3, "there was a deadlock"
    assert database.effects() == ["backward", "forward"]
