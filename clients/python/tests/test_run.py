"""Work that is called again: ``run``, after conflicts, after lost connections, and many at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg
import psycopg2
import pytest
from pg_idempotency import (
    Answer,
    CommitUnknownError,
    ConflictError,
    IdempotencyError,
    InFlightError,
    OutOfOrderError,
    Refusal,
    Scope,
    UnavailableError,
    idempotent,
    run,
    sqlstate_of,
)
from pg_idempotency._attempts import Attempts
from proxy import CutProxy, at_client_message, before_answer, before_statement
from psycopg_pool import ConnectionPool
from support import Database, answer_behind_its_back, execute, is_idle, new_scope, opener, until


@pytest.fixture(scope="module", autouse=True)
def tables(database: Database) -> None:
    database.query("CREATE TABLE orders (key text)")
    database.query("CREATE TABLE counters (name text PRIMARY KEY, value int NOT NULL)")
    database.query("INSERT INTO counters VALUES ('a', 0), ('b', 0)")


@pytest.fixture
def orders(database: Database, scope: Scope) -> Callable[[], int]:
    """How many rows of the work are there."""
    return lambda: int(database.query("SELECT count(*) FROM orders WHERE key = %s", scope.key)[0][0])


class Work:
    """Work that writes a row; ``then`` is called with the connection and the number of the call."""

    def __init__(self, scope: Scope, then: Callable[[Any, int], Any] | None = None) -> None:
        self.calls = 0
        self._scope = scope
        self._then = then

    def __call__(self, connection: Any) -> Answer:
        self.calls += 1
        execute(connection, "INSERT INTO orders VALUES (%s)", self._scope.key)
        if self._then is not None:
            self._then(connection, self.calls)
        return Answer(201, {"call": self.calls})


def conflict(connection: Any, state: str = "40001") -> None:
    execute(connection, f"DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '{state}'; END $$")


def must_not_run(connection: Any) -> Answer:
    raise AssertionError("the work was called")


def test_the_work_is_done_once(connect: Any, connection: Any, scope: Scope, orders: Any) -> None:
    work = Work(scope)
    first = run(connect, scope, "{}", work)
    assert (first.outcome, first.status, first.text) == ("completed", 201, '{"call":1}')
    for opened in (connect, connection):
        repeat = run(opened, scope, b"{ }", must_not_run)
        assert (repeat.outcome, repeat.status, repeat.text) == ("replayed", 201, '{"call":1}')
    assert (work.calls, orders()) == (1, 1)


def test_a_driver_opens_connections_itself(database: Database, scope: Scope, driver: str, orders: Any) -> None:
    open_one = {"psycopg": lambda: psycopg.connect(database.url), "psycopg2": lambda: psycopg2.connect(database.url)}[
        driver
    ]
    assert run(open_one, scope, None, Work(scope)).outcome == "completed"
    assert orders() == 1


def test_a_4xx_and_a_refusal_are_kept(connect: Any, scope: Scope, orders: Any) -> None:
    def refuse(connection: Any) -> Answer:
        Work(scope)(connection)
        raise Refusal(402, "no money")

    assert run(connect, scope, None, refuse).outcome == "errored"
    assert run(connect, scope, None, must_not_run).status == 402
    other = new_scope()
    assert run(connect, other, None, lambda connection: Answer(404)).outcome == "errored"
    assert run(connect, other, None, must_not_run).status == 404
    assert orders() == 0


def test_work_has_to_return_an_answer(connection: Any, scope: Scope, orders: Any) -> None:
    wrong: Any
    for wrong in (None, {"id": 7}, 201):
        with pytest.raises(TypeError, match="an Answer is needed"):
            run(connection, scope, None, lambda connection: Work(scope)(connection) and wrong)
        assert is_idle(connection)
    assert orders() == 0


def test_it_is_told_what_the_others_are(connection: Any, database: Database, scope: Scope) -> None:
    with database.connect() as other, idempotent(other, scope) as claim:
        with pytest.raises(InFlightError):
            run(connection, scope, None, must_not_run)
        claim.finish(201)
    # one inside of another would need a connection of its own
    with pytest.raises(OutOfOrderError):
        run(connection, new_scope(), None, lambda connection: run(connection, new_scope(), None, must_not_run))


def test_a_repeat_waits_if_it_is_asked_to(connection: Any, database: Database, scope: Scope, driver: str) -> None:
    first = database.connect(driver)
    with idempotent(first, scope) as claim:
        answers: list[Answer] = []
        waiting = threading.Thread(
            target=lambda: answers.append(run(connection, scope, None, must_not_run, wait="20 seconds"))
        )
        waiting.start()
        until(lambda: database.waits("idempotency_try_begin"))
        claim.finish(201, "done")
    waiting.join()
    assert [answer.text for answer in answers] == ['"done"']
    first.close()


def test_ten_at_once_do_the_work_once(connect: Any, scope: Scope, orders: Any) -> None:
    work = Work(scope)
    answers: list[Answer] = []

    def ask() -> None:
        answers.append(run(connect, scope, "{}", work, wait="20 seconds"))

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.text for answer in answers] == ['{"call":1}'] * 10
    assert sorted(str(answer.outcome) for answer in answers) == ["completed"] + ["replayed"] * 9
    assert orders() == 1


class TestConflicts:
    def test_work_runs_again(self, connection: Any, scope: Scope, orders: Any) -> None:
        for state in ("40001", "40P01"):
            work = Work(scope, lambda connection, calls: conflict(connection, state) if calls < 3 else None)
            assert run(connection, new_scope(), None, work).text == '{"call":3}'
        assert orders() == 2

    def test_of_two_transactions(self, database: Database, driver: str, scope: Scope, orders: Any) -> None:
        def count(connection: Any, calls: int) -> None:
            if calls == 1:
                database.query("UPDATE counters SET value = value + 1 WHERE name = 'a'")
            execute(connection, "UPDATE counters SET value = value + 1 WHERE name = 'a'")

        strict = opener(database.url, driver, True, options="-c default_transaction_isolation=repeatable\\ read")
        assert run(strict, scope, None, Work(scope, count)).text == '{"call":2}'
        assert orders() == 1

    def test_at_commit(self, database: Database, driver: str, scope: Scope, orders: Any) -> None:
        # write skew, which only shows when the second of the two commits
        other = database.connect(driver, options="-c default_transaction_isolation=serializable")

        def skew(connection: Any, calls: int) -> None:
            execute(connection, "SELECT sum(value) FROM counters")
            execute(connection, "UPDATE counters SET value = value + 1 WHERE name = 'a'")
            if calls == 1:
                execute(other, "BEGIN")
                execute(other, "SELECT sum(value) FROM counters")
                execute(other, "UPDATE counters SET value = value + 1 WHERE name = 'b'")
                execute(other, "COMMIT")

        strict = opener(database.url, driver, False, options="-c default_transaction_isolation=serializable")
        assert run(strict, scope, None, Work(scope, skew)).text == '{"call":2}'
        assert orders() == 1
        other.close()

    def test_are_bounded(self, connection: Any, scope: Scope) -> None:
        for retries, arguments in [(3, {}), (0, {"retries": 0}), (5, {"retries": 5})]:
            work = Work(scope, lambda connection, calls: conflict(connection, "40P01"))
            with pytest.raises(ConflictError) as raised:
                run(connection, scope, None, work, **arguments)  # type: ignore[arg-type]
            assert work.calls == retries + 1
            assert (raised.value.status, raised.value.sqlstate) == (503, "40P01")
            assert sqlstate_of(raised.value.__cause__) == "40P01"  # type: ignore[arg-type]
            assert is_idle(connection)

    def test_that_the_work_has_wrapped(self, connection: Any, scope: Scope) -> None:
        def wrapped(connection: Any, calls: int) -> None:
            try:
                if calls == 1:
                    conflict(connection)
            except Exception as error:
                raise RuntimeError("of some library") from error

        assert run(connection, scope, None, Work(scope, wrapped)).text == '{"call":2}'

    def test_that_the_work_has_given_up_on(self, connection: Any, scope: Scope) -> None:
        def give_up(connection: Any, calls: int) -> None:
            raise ConflictError("of a service behind", sqlstate="40001")

        work = Work(scope, give_up)
        with pytest.raises(ConflictError, match="behind"):
            run(connection, scope, None, work)
        assert work.calls == 1

    def test_nothing_else_runs_again(self, connection: Any, scope: Scope, orders: Any) -> None:
        work = Work(scope, lambda connection, calls: execute(connection, "SELECT 1/0"))
        with pytest.raises(Exception, match="division by zero"):
            run(connection, scope, None, work)
        assert (work.calls, orders()) == (1, 0)

    def test_a_claim_that_another_transaction_has_committed_is_asked_for_again(
        self, connection: Any, database: Database, scope: Scope, orders: Any
    ) -> None:
        # without the lock of the claim, as on another node, the unique index decides
        def overtake(connection: Any, calls: int) -> None:
            with database.connect() as other:
                answer_behind_its_back(other, scope)

        answer = run(connection, scope, None, Work(scope, overtake))
        assert (answer.status, answer.replayed, orders()) == (202, True, 0)


class TestLostConnections:
    """Without a proxy: those that the server closes."""

    def test_in_the_work(self, connect: Any, database: Database, scope: Scope, orders: Any) -> None:
        def end(connection: Any, calls: int) -> None:
            database.terminate(connection)
            execute(connection, "SELECT 1")

        work = Work(scope, end)
        with pytest.raises(UnavailableError) as raised:
            run(connect, scope, None, work)
        # what it does may be why the server has died
        assert (work.calls, orders(), raised.value.status) == (1, 0, 503)
        assert run(connect, scope, None, Work(scope)).outcome == "completed"

    def test_in_finish(self, connect: Any, connection: Any, database: Database, scope: Scope, orders: Any) -> None:
        work = Work(scope, lambda connection, calls: database.terminate(connection) if calls == 1 else None)
        assert run(connect, scope, None, work).text == '{"call":2}'
        assert orders() == 1
        alone = Work(scope, lambda connection, calls: database.terminate(connection))
        with pytest.raises(UnavailableError) as raised:
            run(connection, new_scope(), None, alone)
        assert type(raised.value.__cause__).__module__.startswith("psycopg")
        assert (alone.calls, orders()) == (1, 1)

    def test_before_begin(self, database: Database, driver: str, scope: Scope) -> None:
        # as pools hand them out that do not look
        stale = [database.connect(driver) for _ in range(3)]
        for connection in stale:
            database.terminate(connection)
        good = database.connect(driver)
        given = iter([*stale[:2], good])
        assert (
            run(lambda: contextlib.nullcontext(next(given)), scope, None, lambda connection: Answer(201)).outcome
            == "completed"
        )
        stale_again = iter(database.connect(driver) for _ in range(9))

        def terminated() -> Any:
            connection = next(stale_again)
            database.terminate(connection)
            return contextlib.nullcontext(connection)

        with pytest.raises(UnavailableError):
            run(terminated, new_scope(), None, must_not_run)
        assert len(list(stale_again)) == 6
        good.close()

    def test_that_cannot_be_opened(self, database: Database, driver: str, autocommit: bool, scope: Scope) -> None:
        tries = 0
        for url in ("postgres://postgres@127.0.0.1:1/postgres", f"{database.url}_missing"):
            with pytest.raises(UnavailableError) as raised:
                run(opener(url, driver, autocommit), scope, None, must_not_run)
            assert raised.value.status == 503
            assert type(raised.value.__cause__).__name__ == "OperationalError"

        def broken() -> Any:
            nonlocal tries
            tries += 1
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run(broken, scope, None, must_not_run)
        assert tries == 1


class TestPool:
    """With the pool of psycopg."""

    @pytest.fixture
    def pool(self, database: Database) -> Iterator[Any]:
        with ConnectionPool(database.url, min_size=1, max_size=1, timeout=0.2) as pool:
            pool.wait(30)
            yield pool

    def test_nothing_is_left_in_its_connections(self, pool: Any, scope: Scope, orders: Any) -> None:
        answer = run(pool.connection, scope, None, Work(scope))
        assert (answer.outcome, run(pool.connection, scope, None, must_not_run).outcome, orders()) == (
            "completed",
            "replayed",
            1,
        )
        for error in (ValueError, ZeroDivisionError):
            with pytest.raises(error):
                run(pool.connection, new_scope(), None, lambda connection: (_ for _ in ()).throw(error))
        with pool.connection() as connection:
            assert is_idle(connection)

    def test_no_connection_is_free(self, pool: Any, scope: Scope) -> None:
        with pool.connection():
            with pytest.raises(UnavailableError) as raised:
                run(pool.connection, scope, None, must_not_run)
        assert type(raised.value.__cause__).__name__ == "PoolTimeout"
        assert run(pool.connection, scope, None, lambda connection: Answer(201)).outcome == "completed"

    def test_its_connections_were_terminated(self, pool: Any, database: Database, scope: Scope) -> None:
        with pool.connection() as connection:
            pid = connection.info.backend_pid
        database.query("SELECT pg_terminate_backend(%s, 10000)", pid)
        pool.timeout = 20
        assert run(pool.connection, scope, None, lambda connection: Answer(201)).outcome == "completed"

    def test_a_pool_itself_opens_nothing(self, pool: Any, scope: Scope) -> None:
        with pytest.raises(TypeError, match="not ConnectionPool"):
            run(pool, scope, None, must_not_run)


@pytest.fixture(scope="module")
def proxy(database: Database) -> Iterator[CutProxy]:
    proxy = CutProxy(database.url)
    yield proxy
    proxy.close()


class TestThroughAProxyThatCuts:
    @pytest.fixture(autouse=True)
    def whole(self, proxy: CutProxy) -> Iterator[None]:
        proxy.pass_all()
        yield
        proxy.pass_all()
        proxy.let_server_notice()

    @pytest.fixture
    def distant(self, proxy: CutProxy, driver: str, autocommit: bool) -> Any:
        return opener(proxy.url, driver, autocommit)

    @pytest.fixture
    def alone(self, distant: Any) -> Iterator[Any]:
        with distant() as connection:
            yield connection

    def test_after_commit_the_answer_is_found(self, proxy: CutProxy, distant: Any, scope: Scope, orders: Any) -> None:
        work = Work(scope, lambda connection, calls: proxy.cut_when(before_answer("COMMIT")))
        answer = run(distant, scope, "{}", work)
        assert (answer.outcome, answer.text, work.calls, orders()) == ("replayed", '{"call":1}', 1, 1)

    def test_before_commit_the_work_runs_again(self, proxy: CutProxy, distant: Any, scope: Scope, orders: Any) -> None:
        def cut(connection: Any, calls: int) -> None:
            if calls == 1:
                proxy.cut_when(before_statement("COMMIT"))

        answer = run(distant, scope, "{}", Work(scope, cut))
        assert (answer.outcome, answer.text, orders()) == ("completed", '{"call":2}', 1)

    @pytest.mark.parametrize("took_effect", [True, False])
    def test_a_connection_alone_cannot_find_out(
        self, proxy: CutProxy, alone: Any, scope: Scope, orders: Any, database: Database, took_effect: bool
    ) -> None:
        condition = before_answer("COMMIT") if took_effect else before_statement("COMMIT")
        work = Work(scope, lambda connection, calls: proxy.cut_when(condition))
        with pytest.raises(CommitUnknownError) as raised:
            run(alone, scope, None, work)
        assert (raised.value.status, raised.value.code) == (503, "OUTCOME_UNKNOWN")
        assert type(raised.value.__cause__).__module__.startswith("psycopg")
        assert (work.calls, orders(), database.record(scope) is not None) == (1, took_effect, took_effect)

    def test_idempotent_cannot_find_out_either(self, proxy: CutProxy, alone: Any, scope: Scope, orders: Any) -> None:
        with pytest.raises(CommitUnknownError):
            with idempotent(alone, scope) as claim:
                claim.finish_with(Work(scope)(alone))
                proxy.cut_when(before_answer("COMMIT"))
        assert claim.answer is None
        assert orders() == 1

    def test_the_server_has_not_noticed(
        self, proxy: CutProxy, distant: Any, database: Database, scope: Scope, orders: Any
    ) -> None:
        def cut(connection: Any, calls: int) -> None:
            if calls == 1:
                proxy.cut_when(before_statement("idempotency_finish"), noticed=False)

        answers: list[Answer] = []
        work = Work(scope, cut)
        asking = threading.Thread(target=lambda: answers.append(run(distant, scope, None, work)))
        asking.start()
        # the second attempt waits for the first, whose transaction is still open
        until(lambda: database.waits("idempotency_try_begin"))
        assert work.calls == 1
        proxy.let_server_notice()
        asking.join()
        assert [answer.text for answer in answers] == ['{"call":2}']
        assert orders() == 1

    def test_how_long_the_next_attempt_waits(self) -> None:
        for said, expected in [(None, "5 seconds"), ("10 ms", "10 ms"), (timedelta(0), timedelta(0))]:
            for error in (CommitUnknownError("lost"), UnavailableError("lost")):
                attempts = Attempts(3, True, said)  # type: ignore[arg-type]
                assert attempts.wait == said
                assert attempts.again_after(error, None) == 0
                assert attempts.wait == expected

    def test_the_server_does_not_notice_in_time(self, proxy: CutProxy, distant: Any, scope: Scope, orders: Any) -> None:
        work = Work(scope, lambda connection, calls: proxy.cut_when(before_statement("COMMIT"), noticed=False))
        # the wait that was asked for comes first
        with pytest.raises(InFlightError):
            run(distant, scope, None, work, wait="10 milliseconds")
        proxy.let_server_notice()
        assert (work.calls, orders()) == (1, 0)

    def test_no_connection_can_be_opened_to_ask(
        self, proxy: CutProxy, distant: Any, database: Database, scope: Scope
    ) -> None:
        # the answer to COMMIT, and then every connection
        work = Work(
            scope,
            lambda connection, calls: proxy.cut_when(
                lambda message: message.origin == "server"
                and (message.type == "R" or message.text.startswith("COMMIT")),
                times=9,
            ),
        )
        with pytest.raises(CommitUnknownError):
            run(distant, scope, None, work)
        assert work.calls == 1
        assert database.record(scope)[0] == "completed"

    def test_asking_is_cut_as_well(
        self, proxy: CutProxy, distant: Any, database: Database, scope: Scope, orders: Any
    ) -> None:
        # nothing but begin is asked, so it can be asked again
        committed, asked = before_answer("COMMIT"), before_statement("idempotency_try_begin")
        cuts = proxy.cuts
        work = Work(
            scope,
            lambda connection, calls: proxy.cut_when(lambda message: committed(message) or asked(message), times=3),
        )
        assert run(distant, scope, None, work).outcome == "replayed"
        assert (proxy.cuts - cuts, work.calls, orders()) == (3, 1, 1)

    def test_in_begin_it_is_asked_for_again(self, proxy: CutProxy, distant: Any, scope: Scope, orders: Any) -> None:
        begins = before_statement("idempotency_try_begin")
        proxy.cut_when(begins, times=2)
        assert run(distant, scope, None, Work(scope)).outcome == "completed"
        cuts = proxy.cuts
        proxy.cut_when(begins, times=9)
        with pytest.raises(UnavailableError):
            run(distant, new_scope(), None, must_not_run)
        assert proxy.cuts - cuts == 3

    def test_a_refusal_whose_answer_is_lost(self, proxy: CutProxy, distant: Any, scope: Scope, orders: Any) -> None:
        calls = 0

        def refuse(connection: Any) -> Answer:
            nonlocal calls
            calls += 1
            Work(scope)(connection)
            proxy.cut_when(before_answer("COMMIT"))
            raise Refusal(402, calls)

        answer = run(distant, scope, None, refuse)
        assert (answer.outcome, answer.status, answer.text, orders()) == ("replayed", 402, "1", 0)

    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize("renewed", [False, True])
    def test_at_any_message_the_work_is_done_once_or_not_at_all(
        self, proxy: CutProxy, database: Database, driver: str, after: bool, renewed: bool
    ) -> None:
        # that the mode changes with it saves half of the time
        distant = opener(proxy.url, driver, autocommit=after)
        for number in range(1, 40):
            scope = new_scope()
            cuts = proxy.cuts
            with distant() as connection:
                proxy.cut_when(at_client_message(number), after=after)
                outcome: Any
                try:
                    outcome = run(distant if renewed else connection, scope, "{}", Work(scope)).outcome
                except IdempotencyError as error:
                    outcome = error
                proxy.pass_all()
            orders = database.query("SELECT count(*) FROM orders WHERE key = %s", scope.key)[0][0]
            record = database.record(scope)
            assert orders == (record is not None), f"cut at message {number}: {outcome!r}"
            if isinstance(outcome, CommitUnknownError):
                assert not renewed
            else:
                assert (orders == 1) == (outcome in ("completed", "replayed")), f"cut at message {number}: {outcome!r}"
                assert isinstance(outcome, (str, UnavailableError))
            if proxy.cuts == cuts:
                assert number > 5
                return
        raise AssertionError("the messages did not come to an end")
