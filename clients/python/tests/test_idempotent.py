"""A request in a transaction: ``idempotent``, over connections of both drivers, in autocommit mode and not."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from pg_idempotency import (
    Answer,
    AnswerTooLargeError,
    ClaimLostError,
    IdempotencyError,
    InFlightError,
    KeyInvalidError,
    KeyMissingError,
    MismatchError,
    OutOfOrderError,
    RawJson,
    Refusal,
    RequestInvalidError,
    Scope,
    UnavailableError,
    UnfinishedError,
    idempotent,
    sqlstate_of,
    status,
    store,
)
from support import Database, commit, execute, is_idle, new_scope, rollback, until


@pytest.fixture(scope="module", autouse=True)
def tables(database: Database) -> None:
    database.query("CREATE TABLE orders (key text)")
    database.query("CREATE TABLE parents (id int PRIMARY KEY)")
    database.query("CREATE TABLE children (parent int REFERENCES parents DEFERRABLE INITIALLY DEFERRED)")


@pytest.fixture
def insert(connection: Any, scope: Scope) -> Callable[[], None]:
    """Writes a row of the work."""
    return lambda: execute(connection, "INSERT INTO orders VALUES (%s)", scope.key) and None


@pytest.fixture
def orders(database: Database, scope: Scope) -> Callable[[], int]:
    """How many rows of the work are there."""
    return lambda: int(database.query("SELECT count(*) FROM orders WHERE key = %s", scope.key)[0][0])


def test_the_work_is_done_once_and_a_repeat_gets_the_same_bytes(
    connection: Any, scope: Scope, insert: Any, orders: Any
) -> None:
    text = b'{"id": 9007199254740993,  "price": 1.50}'
    for request, replayed in [('{"a": 1}', False), (b'{"a":1}', True)]:
        with idempotent(connection, scope, request) as claim:
            assert (claim.replayed, claim.finished, claim.key, claim.scope) == (replayed, False, scope.key, scope)
            if not claim.replayed:
                assert claim.answer is None
                insert()
                claim.finish_with(Answer(201, RawJson(text.decode()), {"location": "/orders/1"}))
                assert claim.finished
                assert claim.answer is None
        assert is_idle(connection)
        assert claim.answer is not None
        assert claim.answer.outcome == ("replayed" if replayed else "completed")
        assert claim.answer.replayed == replayed
        assert (claim.answer.status, claim.answer.content, claim.answer.headers) == (
            201,
            text,
            {"location": "/orders/1"},
        )
    assert orders() == 1


def test_it_is_committed_when_the_block_has_ended(
    connection: Any, scope: Scope, insert: Any, orders: Any, database: Database
) -> None:
    with idempotent(connection, scope) as claim:
        insert()
        claim.finish()
        assert orders() == 0
    assert orders() == 1
    assert database.record(scope)[:2] == ("completed", 200)


def test_a_4xx_is_kept_while_its_rows_are_rolled_back(connection: Any, scope: Scope, insert: Any, orders: Any) -> None:
    for outcome in ("errored", "replayed"):
        with idempotent(connection, scope, "{}") as claim:
            if not claim.replayed:
                insert()
                claim.finish(402, {"error": "no money"})
        assert (claim.answer.outcome, claim.answer.status, claim.answer.text) == (outcome, 402, '{"error":"no money"}')
        assert is_idle(connection)
    assert orders() == 0


def test_the_rows_of_a_4xx_can_be_kept(connection: Any, scope: Scope, insert: Any, orders: Any) -> None:
    with idempotent(connection, scope) as claim:
        insert()
        claim.finish(403, keep_rows=True)
    assert claim.answer.outcome == "errored"
    assert orders() == 1


def test_a_refusal_from_deep_inside_is_the_answer(connection: Any, scope: Scope, insert: Any, orders: Any) -> None:
    def deep() -> None:
        insert()
        raise Refusal(402, {"error": "no money"}, {"x-reason": "poor"}, "2 hours")

    for outcome in ("errored", "replayed"):
        with idempotent(connection, scope) as claim:
            if not claim.replayed:
                deep()
        assert (claim.answer.outcome, claim.answer.status, claim.answer.json()) == (outcome, 402, {"error": "no money"})
        assert claim.answer.headers == {"x-reason": "poor"}
        assert is_idle(connection)
    assert orders() == 0


def test_a_refusal_outweighs_what_was_said_before(connection: Any, scope: Scope) -> None:
    with idempotent(connection, scope) as claim:
        claim.finish(201)
        raise Refusal(404)
    assert claim.answer.status == 404


def test_a_refusal_of_a_repeat_does_not_hide_its_answer(connection: Any, scope: Scope) -> None:
    with idempotent(connection, scope) as claim:
        claim.finish(201)
    with idempotent(connection, scope) as claim:
        raise Refusal(422, {"error": "checked again, before looking"})
    assert (claim.answer.status, claim.answer.replayed) == (201, True)


def test_what_is_not_kept_runs_again(connection: Any, scope: Scope, insert: Any, orders: Any) -> None:
    for answered in (503, 409, 429):
        with idempotent(connection, scope) as claim:
            assert not claim.replayed
            insert()
            claim.finish(answered, {"n": answered})
        assert (claim.answer.outcome, claim.answer.status) == ("released", answered)
    with idempotent(connection, scope) as claim:
        insert()
        claim.finish(201)
    assert claim.answer.outcome == "completed"
    assert orders() == 1


def test_what_the_work_raises_is_passed_on_and_nothing_is_left(
    connection: Any, scope: Scope, insert: Any, orders: Any, database: Database
) -> None:
    error = ValueError("oops")
    for said in (False, True):
        with pytest.raises(ValueError) as raised:
            with idempotent(connection, scope) as claim:
                insert()
                if said:
                    claim.finish(201)
                raise error
        assert raised.value is error
        assert is_idle(connection)
    with pytest.raises(Exception) as of_driver:
        with idempotent(connection, scope):
            execute(connection, "SELECT 1/0")
    assert sqlstate_of(of_driver.value) == "22012"
    assert is_idle(connection)
    assert orders() == 0
    assert database.record(scope) is None


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_rolls_back(connection: Any, scope: Scope, insert: Any, orders: Any, kind: Any) -> None:
    with pytest.raises(kind):
        with idempotent(connection, scope) as claim:
            insert()
            claim.finish(201)
            raise kind
    assert is_idle(connection)
    assert orders() == 0


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard, also where whoever runs the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_the_server_is_at_work(
    database: Database, autocommit: bool, scope: Scope, orders: Any
) -> None:
    # psycopg2 is not interrupted in the middle of a statement
    database.query("SELECT pg_advisory_lock(1)")
    with database.connect("psycopg", autocommit) as connection:

        def interrupt() -> None:
            until(lambda: database.waits("pg_advisory_xact_lock"))
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            with idempotent(connection, scope):
                connection.execute("INSERT INTO orders VALUES (%s)", [scope.key])
                threading.Thread(target=interrupt).start()
                connection.execute("SELECT pg_advisory_xact_lock(1)")
        assert is_idle(connection)
        assert status(connection, scope).outcome is None
    database.query("SELECT pg_advisory_unlock(1)")
    assert orders() == 0


def test_finish_must_not_be_forgotten(connection: Any, scope: Scope, insert: Any, orders: Any) -> None:
    with pytest.raises(UnfinishedError, match='"orders.create" ended without claim.finish') as raised:
        with idempotent(connection, scope):
            insert()
    assert (raised.value.status, raised.value.code) == (500, "IDEMPOTENCY_UNFINISHED")
    assert is_idle(connection)
    assert orders() == 0
    assert status(connection, scope).outcome is None


def test_nothing_is_written_where_nobody_looks_whether_it_is_a_repeat(
    connection: Any, scope: Scope, insert: Any, orders: Any
) -> None:
    with idempotent(connection, scope) as claim:
        insert()
        claim.finish(201)
    with pytest.raises(OutOfOrderError, match="look at claim.replayed"):
        with idempotent(connection, scope) as claim:
            insert()
            claim.finish(201)
    assert orders() == 1
    with idempotent(connection, scope) as claim:
        insert()
    assert claim.answer.replayed
    assert is_idle(connection)
    assert orders() == 1


def test_an_error_that_was_swallowed_is_noticed(connection: Any, scope: Scope, insert: Any, orders: Any) -> None:
    with pytest.raises(Exception) as raised:
        with idempotent(connection, scope) as claim:
            insert()
            try:
                execute(connection, "SELECT 1/0")
            except Exception:
                pass
            claim.finish(201)
    assert sqlstate_of(raised.value) == "25P02"
    assert is_idle(connection)
    assert orders() == 0


def test_a_constraint_that_fails_at_commit_leaves_nothing(
    connection: Any, scope: Scope, insert: Any, orders: Any
) -> None:
    with pytest.raises(Exception) as raised:
        with idempotent(connection, scope) as claim:
            insert()
            execute(connection, "INSERT INTO children VALUES (7)")
            claim.finish(201)
    assert sqlstate_of(raised.value) == "23503"
    assert not isinstance(raised.value, IdempotencyError)
    assert is_idle(connection)
    assert claim.answer is None
    assert orders() == 0
    assert status(connection, scope).outcome is None


def test_finish_is_said_once_and_in_the_block(connection: Any, scope: Scope) -> None:
    with idempotent(connection, scope) as claim:
        claim.finish(201)
        with pytest.raises(OutOfOrderError, match="twice"):
            claim.finish(201)
    with pytest.raises(OutOfOrderError, match="over"):
        claim.finish(201)
    with idempotent(connection, new_scope()) as claim:
        with pytest.raises(TypeError, match="an Answer is needed"):
            claim.finish_with({"id": 7})  # type: ignore[arg-type]
        with pytest.raises(ValueError):
            claim.finish(600)
        claim.finish(204)


def test_finish_is_the_last_statement(connection: Any, scope: Scope, database: Database) -> None:
    execute(connection, "SET application_name = 'seen'")
    connection.commit()
    with idempotent(connection, scope) as claim:
        claim.finish(201)
        execute(connection, "SELECT 'of the work'")
        assert database.query("SELECT query FROM pg_stat_activity WHERE application_name = 'seen'") == [
            ("SELECT 'of the work'",)
        ]
        assert status(connection, scope).outcome == "in_flight"


def test_others_are_told(connection: Any, scope: Scope, database: Database, driver: str) -> None:
    with database.connect(driver) as other:
        with idempotent(connection, scope, '{"a": 1}') as claim:
            with pytest.raises(InFlightError) as in_flight:
                with idempotent(other, scope, '{"a": 1}'):
                    pytest.fail("the work must not run")
            assert (in_flight.value.status, in_flight.value.sqlstate) == (409, "ID003")
            assert in_flight.value.retry_after is not None
            assert in_flight.value.retry_after >= 1
            assert is_idle(other)
            # a different request is told so while the first one is at work
            with pytest.raises(MismatchError):
                with idempotent(other, scope, '{"a": 2}'):
                    pytest.fail("the work must not run")
            claim.finish(201)
        with pytest.raises(MismatchError) as mismatch:
            with idempotent(other, scope, '{"a": 2}'):
                pytest.fail("the work must not run")
        assert (mismatch.value.status, mismatch.value.sqlstate) == (422, "ID004")
        assert is_idle(other)


def test_a_key_must_be_one(connection: Any) -> None:
    wrong = [
        ("", KeyMissingError),
        (None, KeyMissingError),
        (" ", KeyInvalidError),
        ("ä", KeyInvalidError),
        ("x" * 256, KeyInvalidError),
        ("a\0b", KeyInvalidError),
        ("\ud800", KeyInvalidError),
    ]
    for key, kind in wrong:
        with pytest.raises(kind) as raised:
            with idempotent(connection, new_scope(key=key)):
                pytest.fail("the work must not run")
        assert raised.value.status == 400
        assert is_idle(connection)


@pytest.mark.parametrize(
    "request_",
    ['{"a":', '"\\u0000"', '"\\ud800"', "1e400000", "a\0b", '"\ud800"', b'"\xff"', "[" * 20000, {"a": "\ud800"}],
)
def test_a_request_that_the_database_cannot_read_is_the_clients(connection: Any, scope: Scope, request_: Any) -> None:
    with pytest.raises(RequestInvalidError) as raised:
        with idempotent(connection, scope, request_):
            pytest.fail("the work must not run")
    assert (raised.value.status, raised.value.code) == (400, "REQUEST_INVALID")
    assert is_idle(connection)


def test_a_value_of_the_work_that_cannot_be_read_is_not_the_clients(connection: Any, scope: Scope) -> None:
    for wrong in ("SELECT 'x'::uuid", "SELECT 'x'::json"):
        with pytest.raises(Exception) as raised:
            with idempotent(connection, scope, "{}"):
                execute(connection, wrong)
        assert sqlstate_of(raised.value) == "22P02"
        assert not isinstance(raised.value, RequestInvalidError)
    with pytest.raises(Exception) as of_answer:
        with idempotent(connection, scope, "{}") as claim:
            claim.finish_with(Answer(201, RawJson("no JSON")))
    assert sqlstate_of(of_answer.value) == "22P02"
    assert not isinstance(of_answer.value, RequestInvalidError)
    assert is_idle(connection)


def test_a_request_that_is_no_json_value_is_passed_on(connection: Any, scope: Scope) -> None:
    for request in ({"at": object()}, {"a": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            with idempotent(connection, scope, request):
                pytest.fail("the work must not run")
        assert is_idle(connection)


def test_an_answer_that_is_too_large_leaves_nothing(connection: Any, scope: Scope, insert: Any, orders: Any) -> None:
    with pytest.raises(AnswerTooLargeError) as raised:
        with idempotent(connection, scope) as claim:
            insert()
            claim.finish(200, b"x" * (1024 * 1024 + 1))
    assert (raised.value.status, raised.value.sqlstate) == (500, "ID007")
    assert is_idle(connection)
    assert orders() == 0


def test_an_open_transaction_is_refused(connection: Any, scope: Scope, autocommit: bool) -> None:
    # the trap: outside of autocommit mode, a SELECT opens a transaction
    execute(connection, "BEGIN" if autocommit else "SELECT 1")
    with pytest.raises(OutOfOrderError, match="a transaction is open") as raised:
        with idempotent(connection, scope):
            pytest.fail("the work must not run")
    assert raised.value.status == 500
    assert not is_idle(connection)
    with pytest.raises(OutOfOrderError, match="a transaction is open"):
        store(connection, scope, None, Answer(404))
    assert not is_idle(connection)
    rollback(connection)
    with idempotent(connection, scope) as claim:
        claim.finish(201)


def test_a_failed_transaction_is_refused(connection: Any, scope: Scope, autocommit: bool) -> None:
    if autocommit:
        execute(connection, "BEGIN")
    with pytest.raises(Exception, match="division by zero"):
        execute(connection, "SELECT 1/0")
    with pytest.raises(OutOfOrderError):
        with idempotent(connection, scope):
            pytest.fail("the work must not run")


def test_a_transaction_that_a_statement_has_ended_is_over(connection: Any, scope: Scope, autocommit: bool) -> None:
    execute(connection, "BEGIN" if autocommit else "SELECT 1")
    execute(connection, "COMMIT")
    with idempotent(connection, scope) as claim:
        claim.finish(201)
    assert claim.answer.outcome == "completed"


def test_a_work_that_ends_the_transaction_itself_is_told(connection: Any, scope: Scope, autocommit: bool) -> None:
    with pytest.raises(Exception) as committed:
        with idempotent(connection, scope):
            execute(connection, "COMMIT")
    assert sqlstate_of(committed.value) == "ID006"
    assert is_idle(connection)
    with pytest.raises(OutOfOrderError) as rolled_back:
        with idempotent(connection, new_scope()) as claim:
            execute(connection, "ROLLBACK")
            claim.finish(201)
    assert rolled_back.value.sqlstate == "ID008"
    assert is_idle(connection)
    # and the driver knows that no transaction is open
    execute(connection, "SELECT 1")
    assert is_idle(connection) == autocommit
    rollback(connection)
    with idempotent(connection, scope) as claim:
        claim.finish(201)


def test_a_scope_is_begun_once_in_a_transaction(connection: Any, scope: Scope, autocommit: bool) -> None:
    if autocommit:
        execute(connection, "BEGIN")
    with idempotent(connection, scope, commit=False) as claim:
        with pytest.raises((OutOfOrderError, ClaimLostError)):
            with idempotent(connection, scope, commit=False):
                pytest.fail("the work must not run")
        execute(connection, "ROLLBACK TO SAVEPOINT idempotency_work")
        claim.finish(201)
    commit(connection)


class TestInTheTransactionOfTheCaller:
    @pytest.fixture
    def transaction(self, connection: Any, autocommit: bool) -> Any:
        if autocommit:
            execute(connection, "BEGIN")
        return connection

    @pytest.fixture
    def write(self, transaction: Any, scope: Scope) -> Any:
        return lambda: execute(transaction, "INSERT INTO orders VALUES (%s)", scope.key)

    def test_the_caller_commits(self, transaction: Any, scope: Scope, write: Any, orders: Any) -> None:
        write()
        with idempotent(transaction, scope, commit=False) as claim:
            write()
            claim.finish(201, "kept")
        assert not is_idle(transaction)
        assert orders() == 0
        commit(transaction)
        assert (claim.answer.outcome, orders()) == ("completed", 2)

    def test_the_caller_rolls_back(
        self, transaction: Any, scope: Scope, write: Any, orders: Any, database: Database
    ) -> None:
        with idempotent(transaction, scope, commit=False) as claim:
            write()
            claim.finish(201)
        rollback(transaction)
        assert (orders(), database.record(scope)) == (0, None)

    @pytest.mark.parametrize("refused", [True, False])
    def test_a_4xx_undoes_the_work_and_nothing_before(
        self, transaction: Any, scope: Scope, write: Any, orders: Any, database: Database, refused: bool
    ) -> None:
        write()
        with idempotent(transaction, scope, commit=False) as claim:
            write()
            write()
            if refused:
                raise Refusal(402, "no money")
            claim.finish(402, "no money")
        commit(transaction)
        assert (claim.answer.outcome, orders()) == ("errored", 1)
        assert database.record(scope)[:3] == ("errored", 402, '"no money"')

    def test_a_4xx_after_an_error_of_the_database(
        self, transaction: Any, scope: Scope, write: Any, orders: Any
    ) -> None:
        with idempotent(transaction, scope, commit=False) as claim:
            write()
            try:
                execute(transaction, "SELECT 1/0")
            except Exception:
                claim.finish(422, "by zero")
        commit(transaction)
        assert (claim.answer.outcome, orders()) == ("errored", 0)

    def test_what_a_repeat_writes_is_undone(
        self, transaction: Any, scope: Scope, write: Any, orders: Any, autocommit: bool
    ) -> None:
        with idempotent(transaction, scope, commit=False) as claim:
            write()
            claim.finish(201)
        commit(transaction)
        if autocommit:
            execute(transaction, "BEGIN")
        with idempotent(transaction, scope, commit=False) as claim:
            write()
        commit(transaction)
        assert (claim.answer.outcome, orders()) == ("replayed", 1)

    def test_work_that_is_not_finished_cannot_be_committed(
        self, transaction: Any, scope: Scope, write: Any, orders: Any
    ) -> None:
        with pytest.raises(UnfinishedError):
            with idempotent(transaction, scope, commit=False):
                write()
        with pytest.raises(Exception) as raised:
            commit(transaction)
        assert (sqlstate_of(raised.value), orders()) == ("ID006", 0)

    def test_work_that_raises_cannot_be_committed(
        self, transaction: Any, scope: Scope, write: Any, orders: Any
    ) -> None:
        with pytest.raises(ValueError, match="oops"):
            with idempotent(transaction, scope, commit=False) as claim:
                claim.finish(201)
                raise ValueError("oops")
        write()
        with pytest.raises(Exception) as raised:
            commit(transaction)
        assert (sqlstate_of(raised.value), orders()) == ("ID006", 0)

    def test_the_caller_may_go_on_where_there_is_nothing_to_do(
        self, transaction: Any, scope: Scope, write: Any, orders: Any, database: Database
    ) -> None:
        with psycopg.connect(database.url) as other:
            with idempotent(other, scope, "1") as claim:
                for request, kind in [("1", InFlightError), ("2", MismatchError)]:
                    with pytest.raises(kind):
                        with idempotent(transaction, scope, request, commit=False):
                            pytest.fail("the work must not run")
                claim.finish(201)
        write()
        commit(transaction)
        assert orders() == 1

    def test_it_needs_a_transaction(
        self, connection: Any, database: Database, scope: Scope, autocommit: bool, insert: Any
    ) -> None:
        if not autocommit:
            # the driver opens it with the first statement
            with idempotent(connection, scope, commit=False) as claim:
                claim.finish(201)
            connection.commit()
            assert database.record(scope)[0] == "completed"
            return
        with pytest.raises(OutOfOrderError, match="commit=False, a transaction has to be open"):
            with idempotent(connection, scope, commit=False):
                pytest.fail("the work must not run")
        with idempotent(connection, scope) as claim:
            claim.finish(201)
        with pytest.raises(OutOfOrderError, match="commit=False, a transaction has to be open"):
            with idempotent(connection, scope, commit=False):
                pytest.fail("the work must not run")


class TestInABlockOfTheDriver:
    def test_of_psycopg(self, database: Database, autocommit: bool, scope: Scope, orders: Any) -> None:
        with database.connect("psycopg", autocommit) as connection:
            with connection.transaction():
                connection.execute("INSERT INTO orders VALUES (%s)", [scope.key])
                with pytest.raises(OutOfOrderError, match="a transaction is open"):
                    with idempotent(connection, scope):
                        pytest.fail("the work must not run")
                with idempotent(connection, scope, commit=False) as claim:
                    claim.finish(201)
            assert (is_idle(connection), orders()) == (True, 1)
            with pytest.raises(psycopg.DatabaseError) as raised:
                with connection.transaction(), pytest.raises(UnfinishedError):
                    with idempotent(connection, new_scope(), commit=False):
                        connection.execute("INSERT INTO orders VALUES (%s)", [scope.key])
        assert (raised.value.sqlstate, orders()) == ("ID006", 1)

    @pytest.mark.parametrize("commit", [True, False])
    def test_of_psycopg2(self, database: Database, autocommit: bool, scope: Scope, orders: Any, commit: bool) -> None:
        connection = database.connect("psycopg2", autocommit)
        for outcome in ("completed", "replayed"):
            with connection:
                with idempotent(connection, scope, commit=commit) as claim:
                    if not claim.replayed:
                        execute(connection, "INSERT INTO orders VALUES (%s)", scope.key)
                        claim.finish(201)
            assert (is_idle(connection), claim.answer.outcome, orders()) == (True, outcome, 1)
        connection.close()


class TestALostConnection:
    def test_that_is_closed_already(self, connection: Any, scope: Scope) -> None:
        connection.close()
        with pytest.raises(UnavailableError) as raised:
            with idempotent(connection, scope):
                pytest.fail("the work must not run")
        assert (raised.value.status, raised.value.code) == (503, "DATABASE_UNAVAILABLE")

    def test_before_it_was_used(self, connection: Any, scope: Scope, database: Database) -> None:
        database.terminate(connection)
        with pytest.raises(UnavailableError) as raised:
            with idempotent(connection, scope):
                pytest.fail("the work must not run")
        assert isinstance(raised.value.__cause__, Exception)
        assert connection.closed

    @pytest.mark.parametrize("where", ["in the work", "in finish", "in the answer of a refusal"])
    def test_before_commit(
        self, connection: Any, scope: Scope, database: Database, insert: Any, orders: Any, where: str
    ) -> None:
        with pytest.raises(UnavailableError) as raised:
            with idempotent(connection, scope) as claim:
                insert()
                database.terminate(connection)
                if where == "in the work":
                    insert()
                if where == "in the answer of a refusal":
                    raise Refusal(402)
                claim.finish(201)
        assert type(raised.value.__cause__).__module__.startswith("psycopg")
        assert orders() == 0
        assert database.record(scope) is None

    def test_does_not_hide_another_error(self, connection: Any, scope: Scope, database: Database) -> None:
        with pytest.raises(ValueError, match="oops"):
            with idempotent(connection, scope):
                database.terminate(connection)
                with pytest.raises(Exception):
                    execute(connection, "SELECT 1")
                raise ValueError("oops")
