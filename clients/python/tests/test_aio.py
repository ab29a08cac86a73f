"""The calls for asynchronous connections of psycopg: that they are those of the package, and what cancelling does."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from pg_idempotency import (
    Answer,
    ClaimLostError,
    CommitUnknownError,
    ConflictError,
    IdempotencyError,
    InFlightError,
    MismatchError,
    OutOfOrderError,
    RawJson,
    Recovery,
    Refusal,
    RequestInvalidError,
    RolledBackError,
    Scope,
    UnavailableError,
    UnfinishedError,
)
from pg_idempotency._connections import async_session_of
from pg_idempotency._statements import Statement
from pg_idempotency.aio import LeasedClaim, first_seen, idempotent, lease, run, status, store
from proxy import CutProxy, at_client_message, before_answer, before_statement
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from support import Database, answer_behind_its_back, is_idle, new_scope


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def carried_out(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 60))

    return carried_out


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so, and let other tasks go on."""
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to be so")


Opener = Callable[[], Any]


def opener(url: str, autocommit: bool, **arguments: Any) -> Opener:
    """What opens a connection each time, as the method ``connection`` of a pool does."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        async with await psycopg.AsyncConnection.connect(url, autocommit=autocommit, **arguments) as connection:
            yield connection

    return opened


@pytest.fixture(scope="module", autouse=True)
def tables(database: Database) -> None:
    database.query("CREATE TABLE orders (key text)")
    database.query("CREATE TABLE parents (id int PRIMARY KEY)")
    database.query("CREATE TABLE children (parent int REFERENCES parents DEFERRABLE INITIALLY DEFERRED)")


@pytest.fixture
def connect(database: Database, autocommit: bool) -> Opener:  # type: ignore[override]
    return opener(database.url, autocommit)


@pytest.fixture
def orders(database: Database, scope: Scope) -> Callable[[], int]:
    """How many rows of the work are there."""
    return lambda: int(database.query("SELECT count(*) FROM orders WHERE key = %s", scope.key)[0][0])


async def insert(connection: Any, scope: Scope) -> None:
    await connection.execute("INSERT INTO orders VALUES (%s)", [scope.key])


async def must_not_run(connection: Any) -> Answer:
    raise AssertionError("the work was called")


class TestIdempotent:
    @asynchronous
    async def test_the_work_is_done_once(self, connect: Opener, scope: Scope, orders: Any) -> None:
        async with connect() as connection:
            for request, outcome in [('{"a": 1}', "completed"), (b'{"a":1}', "replayed")]:
                async with idempotent(connection, scope, request) as claim:
                    if not claim.replayed:
                        await insert(connection, scope)
                        claim.finish(201, RawJson('{"id":  9007199254740993}'), {"x": "1"})
                assert (claim.answer.outcome, claim.answer.text, claim.answer.headers) == (
                    outcome,
                    '{"id":  9007199254740993}',
                    {"x": "1"},
                )
                assert is_idle(connection)
            assert orders() == 1
            with pytest.raises(MismatchError):
                async with idempotent(connection, scope, '{"a": 2}'):
                    pytest.fail("the work must not run")
            assert is_idle(connection)

    @asynchronous
    async def test_a_refusal_is_kept_and_its_rows_are_not(self, connect: Opener, scope: Scope, orders: Any) -> None:
        async with connect() as connection:
            for outcome in ("errored", "replayed"):
                async with idempotent(connection, scope) as claim:
                    if not claim.replayed:
                        await insert(connection, scope)
                        raise Refusal(402, b"\0\\")
                assert (claim.answer.outcome, claim.answer.status, claim.answer.content) == (outcome, 402, b"\0\\")
        assert orders() == 0

    @asynchronous
    async def test_what_goes_wrong_leaves_nothing(self, connect: Opener, scope: Scope, orders: Any) -> None:
        async with connect() as connection:
            with pytest.raises(ValueError, match="oops"):
                async with idempotent(connection, scope) as claim:
                    await insert(connection, scope)
                    claim.finish()
                    raise ValueError("oops")
            with pytest.raises(UnfinishedError):
                async with idempotent(connection, scope):
                    await insert(connection, scope)
            with pytest.raises(psycopg.errors.InFailedSqlTransaction):
                async with idempotent(connection, scope) as claim:
                    with pytest.raises(psycopg.errors.DivisionByZero):
                        await connection.execute("SELECT 1/0")
                    claim.finish()
            with pytest.raises(psycopg.errors.ForeignKeyViolation):
                async with idempotent(connection, scope) as claim:
                    await insert(connection, scope)
                    await connection.execute("INSERT INTO children VALUES (7)")
                    claim.finish()
            with pytest.raises(RequestInvalidError):
                async with idempotent(connection, scope, "{"):
                    pytest.fail("the work must not run")
            assert is_idle(connection)
            assert (await status(connection, scope)).outcome is None
        assert orders() == 0

    @asynchronous
    async def test_an_open_transaction_is_refused(self, connect: Opener, scope: Scope, autocommit: bool) -> None:
        async with connect() as connection:
            await connection.execute("BEGIN" if autocommit else "SELECT 1")
            with pytest.raises(OutOfOrderError, match="a transaction is open"):
                async with idempotent(connection, scope):
                    pytest.fail("the work must not run")
            await connection.rollback()
            async with connection.pipeline():
                with pytest.raises(OutOfOrderError, match="pipeline mode"):
                    async with idempotent(connection, scope):
                        pytest.fail("the work must not run")

    @asynchronous
    async def test_in_the_transaction_of_the_caller(self, connect: Opener, scope: Scope, orders: Any) -> None:
        async with connect() as connection:
            for outcome in ("errored", "replayed"):
                async with connection.transaction():
                    await insert(connection, scope)
                    async with idempotent(connection, scope, commit=False) as claim:
                        await insert(connection, scope)
                        if not claim.replayed:
                            claim.finish(402)
                assert claim.answer.outcome == outcome
        assert orders() == 2

    @asynchronous
    async def test_a_commit_that_was_a_rollback_is_noticed(self, connect: Opener) -> None:
        async with connect() as connection:
            session = async_session_of(connection)
            await session.begin()
            with pytest.raises(psycopg.errors.DivisionByZero):
                await session.fetch(Statement("SELECT 1/%s", (0,)))
            with pytest.raises(RolledBackError):
                await session.commit()

    @asynchronous
    async def test_connections_of_all_kinds(self, database: Database) -> None:
        kinds: list[dict[str, Any]] = [
            {"row_factory": dict_row},
            {"prepare_threshold": 0},
            {"cursor_factory": psycopg.AsyncClientCursor},
            {"options": "-c default_transaction_isolation=serializable"},
        ]
        for arguments in kinds:
            scope = new_scope()
            for outcome in ("completed", "replayed"):
                answer = await run(opener(database.url, True, **arguments), scope, "{}", answered(201, b"\0"))
                assert (answer.outcome, answer.content) == (outcome, b"\0")

    @asynchronous
    async def test_others_need_the_calls_for_others(self, database: Database, scope: Scope) -> None:
        from pg_idempotency import idempotent as synchronous

        with database.connect() as ordinary, pytest.raises(TypeError, match="asynchronous connection"):
            idempotent(ordinary, scope)
        async with opener(database.url, True)() as connection:
            with pytest.raises(TypeError, match="needs pg_idempotency.aio"):
                synchronous(connection, scope)


def answered(code: int, body: Any = None) -> Callable[[Any], Awaitable[Answer]]:
    """Work that does nothing but answer."""

    async def work(connection: Any) -> Answer:
        return Answer(code, body)

    return work


class TestRun:
    @asynchronous
    async def test_conflicts(self, connect: Opener, scope: Scope, orders: Any) -> None:
        calls = 0

        async def work(connection: Any) -> Answer:
            nonlocal calls
            calls += 1
            await insert(connection, scope)
            if calls < 3:
                await connection.execute("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")
            return Answer(201, calls)

        assert (await run(connect, scope, None, work)).text == "3"
        assert (await run(connect, scope, None, must_not_run)).replayed
        assert orders() == 1
        calls = -99
        with pytest.raises(ConflictError):
            await run(connect, new_scope(), None, work, retries=2)
        assert calls == -96

    @asynchronous
    async def test_ten_at_once_do_the_work_once(self, connect: Opener, scope: Scope, orders: Any) -> None:
        async def work(connection: Any) -> Answer:
            await insert(connection, scope)
            return Answer(201, "done")

        answers = await asyncio.gather(*(run(connect, scope, None, work, wait="20 seconds") for _ in range(10)))
        assert [answer.text for answer in answers] == ['"done"'] * 10
        assert [answer.outcome for answer in answers].count("completed") == 1
        assert orders() == 1

    @asynchronous
    async def test_a_repeat_meanwhile(self, connect: Opener, scope: Scope) -> None:
        async def work(connection: Any) -> Answer:
            with pytest.raises(InFlightError):
                await run(connect, scope, None, must_not_run)
            return Answer(201)

        assert (await run(connect, scope, None, work)).outcome == "completed"

    @asynchronous
    async def test_a_driver_opens_connections_itself(self, database: Database, scope: Scope) -> None:
        def opened() -> Any:
            return psycopg.AsyncConnection.connect(database.url)

        assert (await run(opened, scope, None, answered(201))).outcome == "completed"
        with pytest.raises(UnavailableError):
            await run(opener("postgres://postgres@127.0.0.1:1/postgres", True), scope, None, must_not_run)

    @asynchronous
    async def test_a_pool(self, database: Database, scope: Scope, orders: Any) -> None:
        async with AsyncConnectionPool(database.url, min_size=1, max_size=1, timeout=0.2, open=False) as pool:
            await pool.wait(30)

            async def work(connection: Any) -> Answer:
                await insert(connection, scope)
                with pytest.raises(UnavailableError):
                    await run(pool.connection, new_scope(), None, must_not_run)
                return Answer(201)

            assert (await run(pool.connection, scope, None, work)).outcome == "completed"
            assert (await run(pool.connection, scope, None, must_not_run)).outcome == "replayed"
        assert orders() == 1

    @asynchronous
    async def test_a_connection_that_is_lost(
        self, connect: Opener, database: Database, scope: Scope, orders: Any
    ) -> None:
        calls = 0

        async def work(connection: Any, in_work: bool) -> Answer:
            nonlocal calls
            calls += 1
            await insert(connection, scope)
            if calls == 1:
                database.terminate(connection)
                if in_work:
                    await insert(connection, scope)
            return Answer(201, calls)

        with pytest.raises(UnavailableError):
            await run(connect, scope, None, functools.partial(work, in_work=True))
        calls = 0
        assert (await run(connect, scope, None, functools.partial(work, in_work=False))).text == "2"
        assert orders() == 1


class TestLease:
    @asynchronous
    async def test_a_lease(self, connect: Opener, database: Database, scope: Scope, orders: Any) -> None:
        async with connect() as alone:
            for anyhow in (connect, alone):
                scope = new_scope()
                with pytest.raises(ValueError, match="oops"):
                    async with lease(anyhow, scope, "{}", lease="5 minutes") as claim:
                        assert isinstance(claim, LeasedClaim)
                        assert (claim.attempt, claim.recovery) == (1, None)
                        with pytest.raises(InFlightError):
                            async with lease(anyhow, scope, "{}"):
                                pytest.fail("the work must not run")
                        await claim.checkpoint("charged", {"id": 7})
                        raise ValueError("oops")
                async with lease(anyhow, scope, "{}") as claim:
                    assert claim.recovery == Recovery("charged", {"id": 7})
                    with pytest.raises(ZeroDivisionError):
                        async with claim.transaction() as connection:
                            await insert(connection, scope)
                            await claim.checkpoint("inside")
                            raise ZeroDivisionError
                    with pytest.raises(UnfinishedError):
                        async with claim.transaction() as connection:
                            await insert(connection, scope)
                    assert claim.recovery == Recovery("charged", {"id": 7})
                    async with claim.transaction() as connection:
                        await insert(connection, scope)
                        claim.finish(201, claim.recovery.state)
                assert (claim.answer.outcome, claim.answer.json()) == ("completed", {"id": 7})
                assert database.query("SELECT count(*) FROM orders WHERE key = %s", scope.key) == [(1,)]
                async with lease(anyhow, scope, "{}") as claim:
                    assert claim.replayed

    @asynchronous
    async def test_it_is_given_back_and_fenced(self, connect: Opener, database: Database, scope: Scope) -> None:
        async with lease(connect, scope) as claim:
            await claim.release()
        async with lease(connect, scope) as claim:
            raise Refusal(503)
        assert (claim.answer.outcome, claim.answer.status) == ("released", 503)
        with pytest.raises(ClaimLostError):
            async with lease(connect, scope) as claim:
                database.query(
                    "UPDATE idempotency.idempotency_key SET lease_expires_at = now() - interval '1 s' WHERE key = %s",
                    scope.key,
                )
                async with lease(connect, scope) as second:
                    second.finish(201)
                claim.finish(202)
        async with connect() as connection:
            found = await status(connection, scope)
        assert found.answer is not None
        assert found.answer.status == 201


class TestOtherCalls:
    @asynchronous
    async def test_store_status_and_first_seen(self, connect: Opener, database: Database, scope: Scope) -> None:
        async with connect() as connection:
            assert (await store(connection, scope, "1", Answer(404, "x"))).outcome == "errored"
            assert (await store(connection, scope, "1", Answer(201))).status == 404
            with pytest.raises(MismatchError):
                await store(connection, scope, "2", Answer(201))
            with pytest.raises(RequestInvalidError):
                await store(connection, scope, "{", Answer(201))
            assert is_idle(connection)
            found = await status(connection, scope, "1")
            assert found.answer is not None
            assert (found.outcome, found.answer.json()) == ("replayed", "x")
            with pytest.raises(MismatchError):
                await status(connection, scope, "2")
            assert is_idle(connection)
            async with connection.transaction():
                assert await first_seen(connection, scope.key, ["b", "a", "b"]) == ["b", "a"]
            assert await first_seen(connection, scope.key, ["a", "c"]) == ["c"]
            with pytest.raises(IdempotencyError) as raised:
                await first_seen(connection, scope.key, [""])
            assert raised.value.sqlstate == "ID001"
            database.terminate(connection)
            with pytest.raises(UnavailableError):
                await status(connection, scope)


@pytest.fixture(scope="module")
def proxy(database: Database) -> Iterator[CutProxy]:
    proxy = CutProxy(database.url)
    yield proxy
    proxy.close()


class TestCancelling:
    """A task that is cancelled while it waits for the database leaves no transaction open, and no claim held."""

    async def cancelled(self, task: asyncio.Task[None], database: Database, waiting: str) -> None:
        """Cancel a task as soon as the server waits in a statement."""
        await until(lambda: database.waits(waiting))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def is_over(self, connection: Any, database: Database) -> None:
        """Its connection is idle or closed, and the server holds nothing of it."""
        assert connection.closed or is_idle(connection)
        await until(lambda: not database.has_claims())

    @asynchronous
    async def test_in_the_work(self, connect: Opener, database: Database, scope: Scope, orders: Any) -> None:
        database.query("SELECT pg_advisory_lock(1)")
        async with connect() as connection:

            async def ask() -> None:
                async with idempotent(connection, scope) as claim:
                    await insert(connection, scope)
                    await connection.execute("SELECT pg_advisory_xact_lock(1)")
                    claim.finish()

            await self.cancelled(asyncio.create_task(ask()), database, "pg_advisory_xact_lock")
            database.query("SELECT pg_advisory_unlock(1)")
            await self.is_over(connection, database)
        assert orders() == 0

    @asynchronous
    async def test_in_begin(self, connect: Opener, database: Database, scope: Scope) -> None:
        with database.connect() as holder:
            from pg_idempotency import idempotent as synchronous

            with synchronous(holder, scope) as held:
                async with connect() as connection:

                    async def ask() -> None:
                        async with idempotent(connection, scope, wait="1 minute"):
                            pytest.fail("the work must not run")

                    await self.cancelled(asyncio.create_task(ask()), database, "idempotency_try_begin")
                held.finish(201)
            await self.is_over(connection, database)

    @pytest.mark.parametrize("where", ["idempotency_finish", "COMMIT"])
    @asynchronous
    async def test_in_finish_and_commit(
        self, connect: Opener, database: Database, scope: Scope, orders: Any, where: str
    ) -> None:
        # an answer that is not committed stops finish, and a trigger COMMIT
        blocker = database.connect(autocommit=False)
        async with connect() as connection:

            async def ask() -> None:
                async with idempotent(connection, scope) as claim:
                    await insert(connection, scope)
                    if where == "COMMIT":
                        blocker.execute("SELECT pg_advisory_xact_lock(1)")
                    else:
                        answer_behind_its_back(blocker, scope)
                    claim.finish(201)

            with database.held_up("orders"):
                await self.cancelled(asyncio.create_task(ask()), database, where)
                blocker.rollback()
                await self.is_over(connection, database)
        blocker.close()
        # COMMIT may have gone on, but never by halves
        assert orders() == (database.record(scope) is not None)

    @asynchronous
    async def test_twice(self, connect: Opener, database: Database, scope: Scope, orders: Any) -> None:
        database.query("SELECT pg_advisory_lock(1)")
        async with connect() as connection:

            async def ask() -> None:
                async with idempotent(connection, scope) as claim:
                    await insert(connection, scope)
                    try:
                        await connection.execute("SELECT pg_advisory_xact_lock(1)")
                    except asyncio.CancelledError:
                        task.cancel()
                        raise
                    claim.finish()

            task = asyncio.create_task(ask())
            await self.cancelled(task, database, "pg_advisory_xact_lock")
            database.query("SELECT pg_advisory_unlock(1)")
            await self.is_over(connection, database)
        assert orders() == 0

    @asynchronous
    async def test_under_a_lease(self, connect: Opener, scope: Scope) -> None:
        started = asyncio.Event()

        async def ask() -> None:
            async with lease(connect, scope) as claim:
                await claim.checkpoint("charged")
                started.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(ask())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # it was given back
        async with lease(connect, scope) as claim:
            assert claim.recovery == Recovery("charged", None)
            claim.finish()


class TestThroughAProxyThatCuts:
    @pytest.fixture(autouse=True)
    def whole(self, proxy: CutProxy) -> Iterator[None]:
        proxy.pass_all()
        yield
        proxy.pass_all()

    @asynchronous
    async def test_commit(self, proxy: CutProxy, autocommit: bool, scope: Scope, orders: Any) -> None:
        distant = opener(proxy.url, autocommit)

        async def work(connection: Any) -> Answer:
            await insert(connection, scope)
            proxy.cut_when(before_answer("COMMIT"))
            return Answer(201)

        assert (await run(distant, scope, None, work)).outcome == "replayed"
        async with distant() as alone:
            with pytest.raises(CommitUnknownError):
                await run(alone, new_scope(), None, work)
        async with lease(distant, new_scope()) as claim:
            async with claim.transaction():
                claim.finish(202)
                proxy.cut_when(before_answer("COMMIT"))
            assert claim.answer is not None
        assert claim.answer.status == 202
        with pytest.raises(CommitUnknownError):
            async with lease(distant, new_scope()) as claim:
                async with claim.transaction():
                    claim.finish(202)
                    proxy.cut_when(before_statement("COMMIT"))

    @pytest.mark.parametrize("after", [False, True])
    @asynchronous
    async def test_at_any_message(self, proxy: CutProxy, database: Database, autocommit: bool, after: bool) -> None:
        distant = opener(proxy.url, autocommit)
        for number in range(1, 40):
            scope = new_scope()
            cuts = proxy.cuts

            async def work(connection: Any) -> Answer:
                await insert(connection, scope)
                return Answer(201)

            async with distant() as _:
                proxy.cut_when(at_client_message(number), after=after)
                outcome: Any
                try:
                    outcome = (await run(distant, scope, "{}", work)).outcome
                except UnavailableError as error:
                    outcome = error
                proxy.pass_all()
            orders = database.query("SELECT count(*) FROM orders WHERE key = %s", scope.key)[0][0]
            assert orders == (outcome in ("completed", "replayed")), f"cut at message {number}: {outcome!r}"
            assert orders == (database.record(scope) is not None)
            if proxy.cuts == cuts:
                assert number > 5
                return
        raise AssertionError("the messages did not come to an end")
