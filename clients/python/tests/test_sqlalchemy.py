"""The calls over sessions of SQLAlchemy, with psycopg2, and with psycopg where this SQLAlchemy knows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy
from pg_idempotency import (
    Answer,
    InFlightError,
    MismatchError,
    OutOfOrderError,
    Refusal,
    UnfinishedError,
    first_seen,
    idempotent,
    lease,
    run,
    sqlstate_of,
    status,
)
from sqlalchemy import Column, ForeignKey, Integer, Text, text
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker

Base = declarative_base()


class Order(Base):
    __tablename__ = "orders"
    id = Column(Integer, primary_key=True)
    sku = Column(Text, nullable=False)
    parent = Column(Integer, ForeignKey("orders.id", deferrable=True, initially="DEFERRED"))


drivers = ["psycopg2"] + (["psycopg"] if sqlalchemy.__version__ >= "2" else [])


@pytest.fixture(params=drivers)
def engine(request: Any, database: Any) -> Iterator[Any]:
    engine = sqlalchemy.create_engine(database.url.replace("postgres:", f"postgresql+{request.param}:"))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Any) -> Iterator[Any]:
    with sessionmaker(engine)() as session:
        yield session


@pytest.fixture
def orders(database: Any, engine: Any) -> Any:
    database.query("TRUNCATE orders")
    return lambda: [sku for (sku,) in database.query("SELECT sku FROM orders ORDER BY id")]


def test_rows_and_answer_are_committed_once(session: Any, scope: Any, orders: Any) -> None:
    for replayed in (False, True):
        with idempotent(session, scope, '{"sku": "a"}') as claim:
            assert claim.replayed == replayed
            if not claim.replayed:
                session.add(Order(sku="a"))
                claim.finish(201, {"sku": "a"})
        assert not session.in_transaction()
        assert (claim.answer.status, claim.answer.text) == (201, '{"sku":"a"}')
    assert orders() == ["a"]


def test_pending_objects_are_sent_before_finish(session: Any, scope: Any, orders: Any) -> None:
    # the NOT NULL fails at the flush: if that came after finish, the answer would be there before the error
    sent: list[str] = []
    engine = session.get_bind()
    sqlalchemy.event.listen(engine, "before_cursor_execute", lambda *event: sent.append(event[2]))
    with idempotent(session, scope) as claim:
        session.add(Order(sku="late"))
        claim.finish(201)
    order = [position for position, statement in enumerate(sent) if "INSERT INTO orders" in statement]
    finish = [position for position, statement in enumerate(sent) if "idempotency_finish" in statement]
    assert len(order) == len(finish) == 1
    assert order < finish
    assert finish == [len(sent) - 1]


def test_a_refusal_is_kept_and_its_rows_are_not(session: Any, scope: Any, orders: Any) -> None:
    for replayed in (False, True):
        with idempotent(session, scope) as claim:
            if not claim.replayed:
                session.add(Order(sku="refused"))
                session.flush()
                raise Refusal(402, {"error": "no money"})
        assert (claim.replayed, claim.answer.status, claim.answer.json()) == (replayed, 402, {"error": "no money"})
    assert orders() == []


def test_what_the_work_raises_leaves_nothing(session: Any, scope: Any, orders: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        with idempotent(session, scope):
            session.add(Order(sku="x"))
            session.flush()
            raise ZeroDivisionError
    assert not session.in_transaction()
    assert orders() == []
    assert status(session, scope).outcome is None


def test_finish_must_not_be_forgotten(session: Any, scope: Any, orders: Any) -> None:
    with pytest.raises(UnfinishedError):
        with idempotent(session, scope):
            session.add(Order(sku="x"))
    assert orders() == []


def test_an_open_transaction_is_refused(session: Any, scope: Any) -> None:
    session.execute(text("SELECT 1"))
    with pytest.raises(OutOfOrderError, match="a transaction is open"):
        with idempotent(session, scope):
            pytest.fail("the work must not run")
    assert session.in_transaction()


def test_inside_the_transaction_of_the_caller(session: Any, scope: Any, orders: Any) -> None:
    with session.begin():
        session.add(Order(sku="before"))
        with idempotent(session, scope, commit=False) as claim:
            session.add(Order(sku="undone"))
            session.flush()
            claim.finish(402, {"error": "no"})
        assert claim.answer.outcome == "errored"
        assert orders() == []
    assert orders() == ["before"]
    with idempotent(session, scope) as claim:
        assert claim.replayed


def test_the_commit_of_the_caller_commits_all(session: Any, scope: Any, orders: Any) -> None:
    # with a savepoint in progress, commit() of SQLAlchemy 1.4 would release that and commit nothing
    session.add(Order(sku="before"))
    with idempotent(session, scope, commit=False) as claim:
        session.add(Order(sku="inside"))
        claim.finish(201)
    session.commit()
    assert orders() == ["before", "inside"]
    with idempotent(session, scope, commit=False) as claim:
        assert claim.replayed
    session.add(Order(sku="after"))
    session.commit()
    assert orders() == ["before", "inside", "after"]


def test_a_constraint_that_fails_at_commit_leaves_nothing(session: Any, scope: Any, orders: Any) -> None:
    with pytest.raises(sqlalchemy.exc.IntegrityError) as caught:
        with idempotent(session, scope) as claim:
            session.execute(text("INSERT INTO orders (sku, parent) VALUES ('x', -1)"))
            claim.finish(201)
    assert sqlstate_of(caught.value) == "23503"
    assert not session.in_transaction()
    assert orders() == []
    assert status(session, scope).outcome is None


def test_others_are_told(engine: Any, session: Any, scope: Any) -> None:
    with idempotent(session, scope, '{"amount": 9007199254740993}') as claim:
        with sessionmaker(engine)() as other:
            with pytest.raises(InFlightError) as caught:
                idempotent(other, scope, '{"amount": 9007199254740993}').__enter__()
            assert caught.value.retry_after == 1
            assert not other.in_transaction()
        claim.finish()
    with pytest.raises(MismatchError):
        idempotent(session, scope, '{"amount": 9007199254740992}').__enter__()


def test_run_does_the_work_again_after_a_conflict(engine: Any, scope: Any, orders: Any) -> None:
    calls = 0

    def work(session: Any) -> Answer:
        nonlocal calls
        calls += 1
        session.add(Order(sku=f"try {calls}"))
        session.flush()
        if calls == 1:
            session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"))
        return Answer(201, calls)

    answer = run(sessionmaker(engine), scope, None, work)
    assert (answer.status, answer.json(), calls) == (201, 2, 2)
    assert orders() == ["try 2"]


def test_run_asks_once_more_after_a_lost_connection(engine: Any, database: Any, scope: Any, orders: Any) -> None:
    calls = 0

    def work(session: Any) -> Answer:
        nonlocal calls
        calls += 1
        session.add(Order(sku=f"try {calls}"))
        session.flush()
        if calls == 1:
            pid = session.execute(text("SELECT pg_backend_pid()")).scalar()
            database.query("SELECT pg_terminate_backend(%s, 5000)", pid)
        return Answer(201, calls)

    assert run(sessionmaker(engine), scope, None, work).json() == 2
    assert orders() == ["try 2"]


def test_a_scoped_session(engine: Any, scope: Any, orders: Any) -> None:
    registry = scoped_session(sessionmaker(engine))
    with idempotent(registry, scope) as claim:
        registry.add(Order(sku="scoped"))
        claim.finish(201)
    registry.remove()
    assert orders() == ["scoped"]


def test_a_lease(engine: Any, scope: Any, orders: Any) -> None:
    sessions = sessionmaker(engine)
    with pytest.raises(ZeroDivisionError):
        with lease(sessions, scope) as claim:
            claim.checkpoint("charged", {"charge": 1})
            raise ZeroDivisionError
    with lease(sessions, scope) as claim:
        assert (claim.attempt, claim.recovery.point, claim.recovery.state) == (2, "charged", {"charge": 1})
        with claim.transaction() as session:
            session.add(Order(sku="leased"))
            claim.finish(201, {"ok": True})
    assert claim.answer.outcome == "completed"
    assert orders() == ["leased"]


def test_first_seen(session: Any, scope: Any) -> None:
    consumer = scope.key
    with session.begin():
        assert first_seen(session, consumer, ["b", "a", "b"]) == ["b", "a"]
    with session.begin():
        assert first_seen(session, consumer, ["a", "c"]) == ["c"]
