"""Work with effects outside of the database: ``lease``, with a connection alone and with what opens connections."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ClassVar

import psycopg
import pytest
from pg_idempotency import (
    Answer,
    AnswerTooLargeError,
    ClaimLostError,
    CommitUnknownError,
    ConflictError,
    IdempotencyError,
    InFlightError,
    LeasedClaim,
    MismatchError,
    OutOfOrderError,
    Recovery,
    Refusal,
    RequestInvalidError,
    Scope,
    UnavailableError,
    UnfinishedError,
    lease,
    run,
    sqlstate_of,
    status,
)
from proxy import CutProxy, at_client_message, before_answer, before_statement
from psycopg_pool import ConnectionPool
from support import Database, commit, execute, is_idle, new_scope, opener, until


@pytest.fixture(scope="module", autouse=True)
def tables(database: Database) -> None:
    database.query("CREATE TABLE charges (key text)")
    database.query("CREATE TABLE parents (id int PRIMARY KEY)")
    database.query("CREATE TABLE children (parent int REFERENCES parents DEFERRABLE INITIALLY DEFERRED)")


@pytest.fixture
def anyhow(connection: Any, connect: Any, driver: str, autocommit: bool) -> Any:
    """A connection alone, and what opens them, each with both drivers and both modes."""
    return connection if autocommit == (driver == "psycopg") else connect


@pytest.fixture
def charges(database: Database, scope: Scope) -> Callable[[], int]:
    """How many rows of the work are there."""
    return lambda: int(database.query("SELECT count(*) FROM charges WHERE key = %s", scope.key)[0][0])


def insert(connection: Any, scope: Scope) -> None:
    execute(connection, "INSERT INTO charges VALUES (%s)", scope.key)


def expire(database: Database, scope: Scope) -> None:
    """Let a lease run out, as time would."""
    database.query(
        "UPDATE idempotency.idempotency_key SET lease_expires_at = now() - interval '1 s' WHERE key = %s", scope.key
    )


def test_the_work_is_done_once(anyhow: Any, scope: Scope) -> None:
    with lease(anyhow, scope, '{"a": 1}') as claim:
        assert isinstance(claim, LeasedClaim)
        assert (claim.replayed, claim.attempt, claim.recovery, claim.key) == (False, 1, None, scope.key)
        assert len(claim.id) == 36
        claim.finish(201, {"a": 1}, {"x": "1"})
        assert claim.answer is None
    assert (claim.answer.outcome, claim.answer.status, claim.answer.text) == ("completed", 201, '{"a":1}')
    with lease(anyhow, scope, '{"a":1}') as claim:
        assert claim.replayed
    assert (claim.answer.outcome, claim.answer.status, claim.answer.text, claim.answer.headers) == (
        "replayed",
        201,
        '{"a":1}',
        {"x": "1"},
    )
    with pytest.raises(MismatchError):
        with lease(anyhow, scope, '{"a": 2}'):
            pytest.fail("the work must not run")


def test_repeats_are_refused_meanwhile(anyhow: Any, connection: Any, scope: Scope) -> None:
    with lease(anyhow, scope, lease="10 minutes") as claim:
        with pytest.raises(InFlightError) as raised:
            with lease(anyhow, scope):
                pytest.fail("the work must not run")
        assert raised.value.retry_after is not None
        assert 500 < raised.value.retry_after <= 600
        assert status(connection, scope).outcome == "in_flight"
        # another request may run inside, as no transaction is open
        assert run(anyhow, new_scope(), None, lambda connection: Answer(201)).outcome == "completed"
        claim.finish()


def test_no_connection_is_held_while_the_work_runs(database: Database, scope: Scope) -> None:
    with ConnectionPool(database.url, min_size=1, max_size=1, timeout=20) as pool:
        with lease(pool.connection, scope) as claim:
            for n in range(2):
                with pool.connection() as connection:
                    assert is_idle(connection)
                claim.checkpoint(f"point-{n}")
            with claim.transaction() as connection:
                insert(connection, scope)
                claim.finish(201)
        assert claim.answer.outcome == "completed"
        with pool.connection() as connection:
            assert is_idle(connection)


def test_an_attempt_after_a_crash_goes_on(anyhow: Any, database: Database, connection: Any, scope: Scope) -> None:
    # an attempt that never comes back
    crashed = lease(anyhow, scope)
    first = crashed.__enter__()
    first.checkpoint("charging", {"amount": 9007199254740993})
    assert first.recovery == Recovery("charging", {"amount": 9007199254740993})
    first.checkpoint("charged", {"charge": "ä'%s\\"})
    assert status(connection, scope).recovery_point == "charged"
    expire(database, scope)
    assert status(connection, scope).outcome == "stalled"
    with lease(anyhow, scope) as claim:
        assert (claim.attempt, claim.recovery) == (2, Recovery("charged", {"charge": "ä'%s\\"}))
        assert claim.id != first.id
        claim.finish(201, claim.recovery.state)
    with pytest.raises(ClaimLostError):
        first.checkpoint("late")


def test_a_short_lease_runs_out(database: Database, driver: str, scope: Scope) -> None:
    connection = database.connect(driver)
    stuck = lease(connection, scope, lease=timedelta(seconds=1))
    stuck.__enter__()
    until(lambda: status(connection, scope).outcome == "stalled")
    with lease(connection, scope) as claim:
        assert claim.attempt == 2
        claim.finish()
    connection.close()


def test_an_attempt_that_was_taken_over_is_fenced(anyhow: Any, database: Database, scope: Scope, charges: Any) -> None:
    with pytest.raises(ClaimLostError) as raised:
        with lease(anyhow, scope) as claim:
            expire(database, scope)
            with lease(anyhow, scope) as second:
                with pytest.raises(ClaimLostError):
                    claim.checkpoint("late")
                with pytest.raises(ClaimLostError):
                    with claim.transaction() as connection:
                        insert(connection, scope)
                        claim.checkpoint("late")
                with pytest.raises(ClaimLostError):
                    with claim.transaction() as connection:
                        insert(connection, scope)
                        claim.finish(201)
                assert (claim.recovery, claim.finished) == (None, False)
                second.finish(201, "second")
            claim.finish(201, "first")
    assert (raised.value.status, raised.value.sqlstate) == (409, "ID005")
    assert database.record(scope)[2] == '"second"'
    assert charges() == 0


def test_what_the_work_raises_gives_the_lease_back(anyhow: Any, scope: Scope) -> None:
    for error in (ValueError("oops"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised:
            with lease(anyhow, scope, '{"a": 1}') as claim:
                claim.checkpoint("charged", "ch_2")
                raise error
        assert raised.value is error
    with pytest.raises(MismatchError):
        with lease(anyhow, scope, '{"a": 2}'):
            pytest.fail("the work must not run")
    with lease(anyhow, scope, '{"a": 1}') as claim:
        assert claim.recovery == Recovery("charged", "ch_2")
        claim.finish()


def test_finish_must_not_be_forgotten(anyhow: Any, scope: Scope) -> None:
    with pytest.raises(UnfinishedError, match="claim.finish or claim.release"):
        with lease(anyhow, scope):
            pass
    with lease(anyhow, scope) as claim:
        claim.finish()
    assert claim.answer.outcome == "completed"


def test_the_lease_can_be_given_back(anyhow: Any, scope: Scope) -> None:
    with lease(anyhow, scope) as claim:
        claim.finish(503)
    assert claim.answer.outcome == "released"
    with lease(anyhow, scope) as claim:
        claim.release()
        for call in (
            claim.release,
            lambda: claim.checkpoint("late"),
            claim.finish,
            lambda: claim.transaction().__enter__(),
        ):
            with pytest.raises(OutOfOrderError, match="over"):
                call()  # type: ignore[operator]
    assert claim.answer is None
    with lease(anyhow, scope) as claim:
        claim.finish()
    assert claim.answer.outcome == "completed"


def test_a_refusal_after_the_lease_was_given_back_is_no_answer(connection: Any, scope: Scope) -> None:
    with pytest.raises(Refusal):
        with lease(connection, scope) as claim:
            claim.release()
            raise Refusal(402)


def test_a_checkpoint_renews_the_lease(anyhow: Any, database: Database, scope: Scope) -> None:
    def ends() -> Any:
        return database.query(
            "SELECT lease_expires_at - now() FROM idempotency.idempotency_key WHERE key = %s", scope.key
        )[0][0]

    with lease(anyhow, scope, lease="1 minute") as claim:
        assert ends() <= timedelta(minutes=1)
        claim.checkpoint("far", lease="1 hour")
        assert ends() > timedelta(minutes=50)
        claim.checkpoint("farther")
        assert ends() <= timedelta(minutes=1)
        claim.finish()


def test_a_recovery_point_whose_effect_was_undone_is_forgotten(anyhow: Any, scope: Scope) -> None:
    with lease(anyhow, scope) as claim:
        claim.checkpoint("charged", 7)
        claim.checkpoint("")
        assert claim.recovery is None
        claim.finish(503)
    with lease(anyhow, scope) as claim:
        assert claim.recovery is None
        claim.finish()


class TestTransaction:
    def test_rows_and_answer_are_committed_together(
        self, anyhow: Any, database: Database, scope: Scope, charges: Any
    ) -> None:
        with lease(anyhow, scope) as claim:
            with claim.transaction() as connection:
                insert(connection, scope)
                claim.finish(201, "paid", ttl="2 hours")
                assert charges() == 0
            assert charges() == 1
            assert claim.answer is not None
            assert (claim.answer.outcome, claim.answer.json()) == ("completed", "paid")
            with pytest.raises(OutOfOrderError):
                claim.checkpoint("late")
        assert claim.answer.outcome == "completed"
        assert database.record(scope)[:3] == ("completed", 201, '"paid"')

    def test_rows_and_checkpoint_are_committed_together(
        self, anyhow: Any, database: Database, scope: Scope, charges: Any
    ) -> None:
        with lease(anyhow, scope) as claim:
            with claim.transaction() as connection:
                insert(connection, scope)
                claim.checkpoint("written", {"n": 1})
                assert database.record(scope)[3] is None
            assert (charges(), database.record(scope)[3], claim.recovery) == (
                1,
                "written",
                Recovery("written", {"n": 1}),
            )
            claim.finish(201)
        assert claim.answer.outcome == "completed"

    def test_one_that_nothing_would_fence_is_refused(self, anyhow: Any, scope: Scope, charges: Any) -> None:
        with lease(anyhow, scope) as claim:
            with pytest.raises(UnfinishedError, match="without claim.finish or claim.checkpoint"):
                with claim.transaction() as connection:
                    insert(connection, scope)
            assert charges() == 0
            claim.finish(201)
        assert claim.answer.outcome == "completed"

    def test_a_4xx_undoes_its_rows(self, anyhow: Any, database: Database, scope: Scope, charges: Any) -> None:
        with lease(anyhow, scope) as claim:
            with claim.transaction() as connection:
                insert(connection, scope)
                claim.checkpoint("undone")
                claim.finish(402, "no money")
            assert claim.recovery is None
        assert (claim.answer.outcome, claim.answer.status, charges()) == ("errored", 402, 0)
        assert database.record(scope)[:3] == ("errored", 402, '"no money"')

    def test_a_4xx_can_keep_its_rows(self, anyhow: Any, scope: Scope, charges: Any) -> None:
        with lease(anyhow, scope) as claim:
            with claim.transaction() as connection:
                insert(connection, scope)
                claim.finish(402, keep_rows=True)
        assert (claim.answer.outcome, charges()) == ("errored", 1)

    def test_a_refusal_ends_the_whole_block(self, anyhow: Any, scope: Scope, charges: Any) -> None:
        with lease(anyhow, scope) as claim:
            with claim.transaction() as connection:
                insert(connection, scope)
                raise Refusal(402, "no money")
            pytest.fail("the work must not go on")
        assert (claim.answer.outcome, claim.answer.json(), charges()) == ("errored", "no money", 0)
        with lease(anyhow, scope) as claim:
            raise Refusal(500)
        assert (claim.answer.status, claim.answer.replayed) == (402, True)

    def test_an_error_in_it_undoes_what_was_said_in_it(
        self, anyhow: Any, database: Database, scope: Scope, charges: Any
    ) -> None:
        with lease(anyhow, scope) as claim:
            claim.checkpoint("before", 1)
            for failing in (lambda connection: execute(connection, "INSERT INTO children VALUES (7)"), self.fail):
                with pytest.raises(Exception) as raised:
                    with claim.transaction() as connection:
                        insert(connection, scope)
                        claim.checkpoint("inside", 2)
                        claim.finish(201)
                        failing(connection)
                assert sqlstate_of(raised.value) == "23503" or isinstance(raised.value, ZeroDivisionError)
                assert (claim.finished, claim.recovery, charges()) == (False, Recovery("before", 1), 0)
            assert database.record(scope)[3] == "before"
            claim.finish(409, "said afterwards")
        assert (claim.answer.outcome, claim.answer.json()) == ("released", "said afterwards")

    def fail(self, connection: Any) -> None:
        raise ZeroDivisionError

    def test_an_error_that_was_swallowed_is_noticed(self, anyhow: Any, scope: Scope, charges: Any) -> None:
        with pytest.raises(Exception) as raised:
            with lease(anyhow, scope) as claim, claim.transaction() as connection:
                insert(connection, scope)
                with pytest.raises(Exception):
                    execute(connection, "SELECT 1/0")
                claim.finish(201)
        assert sqlstate_of(raised.value) == "25P02"
        assert charges() == 0

    def test_no_second_one_is_taken_inside(self, anyhow: Any, scope: Scope) -> None:
        with lease(anyhow, scope) as claim:
            with claim.transaction():
                for call in (claim.release, lambda: claim.transaction().__enter__()):
                    with pytest.raises(OutOfOrderError, match="inside of a transaction"):
                        call()  # type: ignore[operator]
                claim.finish(201)
        assert claim.answer.outcome == "completed"

    def test_a_connection_with_an_open_transaction_is_refused(
        self, connection: Any, scope: Scope, autocommit: bool
    ) -> None:
        def leave_open() -> None:
            execute(connection, "BEGIN" if autocommit else "SELECT 1")

        leave_open()
        with pytest.raises(OutOfOrderError, match="a transaction is open"):
            with lease(connection, scope):
                pytest.fail("the work must not run")
        commit(connection)
        with lease(connection, scope) as claim:
            leave_open()
            for call in (lambda: claim.checkpoint("x"), lambda: claim.transaction().__enter__()):
                with pytest.raises(OutOfOrderError, match="a transaction is open"):
                    call()  # type: ignore[no-untyped-call]
            commit(connection)
            claim.finish()
        assert claim.answer.outcome == "completed"

    def test_its_connection_is_lost(self, connect: Any, database: Database, scope: Scope, charges: Any) -> None:
        with lease(connect, scope) as claim:
            for said in (False, True):
                with pytest.raises(UnavailableError):
                    with claim.transaction() as connection:
                        insert(connection, scope)
                        database.terminate(connection)
                        if said:
                            claim.finish(201)
                        else:
                            insert(connection, scope)
            assert (claim.finished, charges()) == (False, 0)
            claim.finish(200)
        assert claim.answer.outcome == "completed"

    def test_no_connection_is_free(self, database: Database, scope: Scope) -> None:
        with ConnectionPool(database.url, min_size=1, max_size=1, timeout=20) as pool:
            with lease(pool.connection, scope) as claim:
                pool.timeout = 0.1
                with pool.connection():
                    with pytest.raises(UnavailableError):
                        with claim.transaction():
                            pytest.fail("there is none")
                    with pytest.raises(UnavailableError):
                        claim.checkpoint("x")
                claim.finish()


def test_what_comes_after_the_answer_changes_nothing(anyhow: Any, database: Database, scope: Scope) -> None:
    with pytest.raises(ValueError, match="late"):
        with lease(anyhow, scope) as claim:
            with claim.transaction():
                claim.finish(201, "kept")
            raise ValueError("late")
    assert database.record(scope)[:3] == ("completed", 201, '"kept"')
    other = new_scope()
    with lease(anyhow, other) as claim:
        with claim.transaction():
            claim.finish(201, "kept")
        raise Refusal(402, "late")
    assert (claim.answer.status, claim.answer.json()) == (201, "kept")


def test_an_answer_that_is_too_large_gives_the_lease_back(anyhow: Any, scope: Scope) -> None:
    with pytest.raises(AnswerTooLargeError):
        with lease(anyhow, scope) as claim:
            claim.finish(200, b"x" * (1024 * 1024 + 1))
    with lease(anyhow, scope) as claim:
        claim.finish(200)
    assert claim.answer.outcome == "completed"


def test_lifetimes(anyhow: Any, database: Database, scope: Scope) -> None:
    def kept() -> Any:
        query = (
            "SELECT extract(epoch FROM expires_at - finished_at)::int FROM idempotency.idempotency_key WHERE key = %s"
        )
        return database.query(query, scope.key)[0][0]

    with lease(anyhow, scope, ttl=timedelta(hours=2)) as claim:
        claim.finish(404)
    assert 7200 <= kept() <= 8100  # a lease's may be an eighth longer


def test_a_request_that_cannot_be_read_is_the_clients(anyhow: Any, scope: Scope) -> None:
    with pytest.raises(RequestInvalidError):
        with lease(anyhow, scope, "{"):
            pytest.fail("the work must not run")
    with pytest.raises(Exception) as raised:
        with lease(anyhow, scope) as claim, claim.transaction() as connection:
            execute(connection, "SELECT 'x'::uuid")
    assert sqlstate_of(raised.value) == "22P02"
    assert not isinstance(raised.value, RequestInvalidError)


class ConflictingCursor(psycopg.Cursor[Any]):
    """A cursor some of whose statements are in conflict with others."""

    conflicts: ClassVar[list[str]] = []

    def execute(self, query: Any, *arguments: Any, **named: Any) -> Any:
        for name in self.conflicts:
            if name in query:
                self.conflicts.remove(name)
                raise psycopg.errors.SerializationFailure("again")
        return super().execute(query, *arguments, **named)


def test_conflicts_of_its_own_calls(database: Database, autocommit: bool, scope: Scope) -> None:
    connection = database.connect("psycopg", autocommit, cursor_factory=ConflictingCursor)
    ConflictingCursor.conflicts[:] = ["try_begin", "try_begin", "COMMIT", "idempotency_checkpoint"]
    with lease(connection, scope) as claim:
        claim.checkpoint("charged")
        assert ConflictingCursor.conflicts == []
        ConflictingCursor.conflicts[:] = ["idempotency_checkpoint"] * 4
        with pytest.raises(ConflictError) as raised:
            claim.checkpoint("farther")
        assert (raised.value.sqlstate, ConflictingCursor.conflicts) == ("40001", [])
        ConflictingCursor.conflicts[:] = ["idempotency_finish"] * 3
        claim.finish(201)
    assert (claim.answer.outcome, ConflictingCursor.conflicts) == ("completed", [])
    other = new_scope()
    ConflictingCursor.conflicts[:] = ["idempotency_release"]
    with pytest.raises(ValueError, match="oops"):
        with lease(connection, other):
            raise ValueError("oops")
    with lease(connection, other) as claim:
        claim.finish(201)
    connection.close()


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

    def test_in_begin_the_same_claim_is_asked_for_again(self, proxy: CutProxy, distant: Any, scope: Scope) -> None:
        proxy.cut_when(before_answer("COMMIT"))
        with lease(distant, scope) as claim:
            assert claim.attempt == 1
            claim.finish(201)
        assert claim.answer.outcome == "completed"

    def test_every_call_is_sent_again(self, proxy: CutProxy, distant: Any, scope: Scope, charges: Any) -> None:
        cuts = proxy.cuts
        with lease(distant, scope) as claim:
            for condition in (before_answer("COMMIT"), before_statement("COMMIT"), before_statement("checkpoint")):
                proxy.cut_when(condition)
                claim.checkpoint("charged", 1)
            with claim.transaction() as connection:
                insert(connection, scope)
                claim.checkpoint("written", 2)
            claim.finish(201)
            proxy.cut_when(before_answer("COMMIT"))
        assert (claim.answer.outcome, proxy.cuts - cuts, charges()) == ("completed", 4, 1)
        with pytest.raises(ValueError, match="oops"):
            with lease(distant, new_scope()):
                proxy.cut_when(before_answer("COMMIT"))
                raise ValueError("oops")
        assert proxy.cuts - cuts == 5

    def test_after_commit_of_a_transaction_the_answer_is_found(
        self, proxy: CutProxy, distant: Any, scope: Scope, charges: Any
    ) -> None:
        with lease(distant, scope) as claim:
            with claim.transaction() as connection:
                insert(connection, scope)
                claim.finish(201, "paid")
                proxy.cut_when(before_answer("COMMIT"))
            assert claim.answer is not None
        assert (claim.answer.status, claim.answer.json(), charges()) == (201, "paid", 1)

    def test_before_commit_of_a_transaction_the_next_request_goes_on(
        self, proxy: CutProxy, distant: Any, scope: Scope, charges: Any
    ) -> None:
        with pytest.raises(CommitUnknownError) as raised:
            with lease(distant, scope) as claim:
                claim.checkpoint("charged", 1)
                with claim.transaction() as connection:
                    insert(connection, scope)
                    claim.finish(201)
                    proxy.cut_when(before_statement("COMMIT"))
        assert raised.value.status == 503
        with lease(distant, scope) as claim:
            assert claim.recovery == Recovery("charged", 1)
            with claim.transaction() as connection:
                insert(connection, scope)
                claim.finish(201)
        assert (claim.answer.outcome, charges()) == ("completed", 1)

    @pytest.mark.parametrize("finished", [True, False])
    def test_a_commit_that_is_still_going_on_is_waited_for(
        self, proxy: CutProxy, distant: Any, database: Database, scope: Scope, charges: Any, finished: bool
    ) -> None:
        told: list[Any] = []

        def work() -> None:
            try:
                with lease(distant, scope) as claim:
                    with claim.transaction() as connection:
                        insert(connection, scope)
                        if finished:
                            claim.finish(201, "written")
                        else:
                            claim.checkpoint("written")
                        proxy.cut_when(before_statement("COMMIT"), after=True, noticed=False)
                    assert claim.answer is not None
                told.append(claim.answer.json())
            except CommitUnknownError as error:
                told.append(error.status)

        with database.held_up("charges"):
            database.query("SELECT pg_advisory_lock(1)")
            working = threading.Thread(target=work)
            working.start()
            until(lambda: database.waits("idempotency_release"))
            assert told == []
            database.query("SELECT pg_advisory_unlock(1)")
            working.join()
        assert (told, charges()) == (["written"] if finished else [503], 1)
        with lease(distant, scope) as claim:
            assert claim.replayed == finished
            if not finished:
                assert claim.recovery == Recovery("written", None)
                claim.finish()

    def test_nothing_can_be_asked_any_more(
        self, proxy: CutProxy, distant: Any, database: Database, scope: Scope
    ) -> None:
        # the answer to COMMIT, and then every connection
        committed = before_answer("COMMIT")
        cuts = proxy.cuts
        with pytest.raises(CommitUnknownError) as raised:
            with lease(distant, scope) as claim:
                claim.finish(201)
                proxy.cut_when(
                    lambda message: committed(message) or (proxy.cuts > cuts and message.type == "R"), times=99
                )
        assert raised.value.status == 503
        assert database.record(scope)[0] == "completed"

    def test_a_connection_alone_is_lost(
        self, proxy: CutProxy, distant: Any, database: Database, scope: Scope, charges: Any
    ) -> None:
        with distant() as connection:
            with pytest.raises(CommitUnknownError):
                with lease(connection, scope) as claim:
                    with claim.transaction():
                        insert(connection, scope)
                        claim.finish(201)
                        proxy.cut_when(before_answer("COMMIT"))
        assert (database.record(scope)[0], charges()) == ("completed", 1)
        with distant() as connection:
            with pytest.raises(UnavailableError):
                with lease(connection, new_scope()) as claim:
                    proxy.cut_when(before_statement("idempotency_checkpoint"))
                    claim.checkpoint("x")

    @pytest.mark.parametrize("after", [False, True])
    def test_at_any_message_what_was_written_is_there_once(
        self, proxy: CutProxy, database: Database, driver: str, after: bool
    ) -> None:
        # that the mode changes with it saves half of the time
        distant = opener(proxy.url, driver, autocommit=after)
        for number in range(1, 60):
            scope = new_scope()
            cuts = proxy.cuts
            proxy.cut_when(at_client_message(number), after=after)
            outcome: Any
            try:
                with lease(distant, scope) as claim:
                    claim.checkpoint("one", 1)
                    with claim.transaction() as connection:
                        insert(connection, scope)
                        claim.finish(201)
                outcome = claim.answer and claim.answer.status
            except IdempotencyError as error:
                outcome = error
            proxy.pass_all()
            charges = database.query("SELECT count(*) FROM charges WHERE key = %s", scope.key)[0][0]
            state, _, _, point = database.record(scope) or ("nothing", None, None, None)
            if outcome == 201:
                assert (state, charges) == ("completed", 1), f"cut at message {number}"
            else:
                assert isinstance(
                    outcome, (UnavailableError, CommitUnknownError)
                ), f"cut at message {number}: {outcome!r}"
                assert (state, charges) in [("nothing", 0), ("pending", 0)], f"cut at message {number}: {outcome!r}"
                assert point in ("one", None)
            if proxy.cuts == cuts:
                assert number > 10
                return
        raise AssertionError("the messages did not come to an end")
