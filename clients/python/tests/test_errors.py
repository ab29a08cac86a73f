"""What errors mean: by class, wherever a driver or a framework has put the SQLSTATE."""

from __future__ import annotations

import pickle
from typing import Any

import pg_idempotency
import pytest
from pg_idempotency import IdempotencyError, InFlightError, RolledBackError, sqlstate_of
from pg_idempotency._connections import session_of
from pg_idempotency._statements import Statement
from pg_idempotency.errors import BY_SQLSTATE, is_conflict, is_of_driver, reached, translated
from support import Database, execute, new_scope

EXPECTED = {
    "ID001": ("KeyMissingError", 400, "IDEMPOTENCY_KEY_MISSING"),
    "ID002": ("KeyInvalidError", 400, "IDEMPOTENCY_KEY_INVALID"),
    "ID003": ("InFlightError", 409, "DUPLICATE_IN_PROGRESS"),
    "ID004": ("MismatchError", 422, "IDEMPOTENCY_KEY_REUSED"),
    "ID005": ("ClaimLostError", 409, "IDEMPOTENCY_CLAIM_LOST"),
    "ID006": ("UnfinishedError", 500, "IDEMPOTENCY_UNFINISHED"),
    "ID007": ("AnswerTooLargeError", 500, "ANSWER_TOO_LARGE"),
    "ID008": ("OutOfOrderError", 500, "IDEMPOTENCY_OUT_OF_ORDER"),
}


def raised_by(connection: Any, text: str, *values: Any) -> Exception:
    """What a statement raises."""
    try:
        execute(connection, text, *values)
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


@pytest.mark.parametrize("state", EXPECTED)
def test_each_condition_has_its_class(connection: Any, state: str) -> None:
    text = f"DO $$ BEGIN RAISE EXCEPTION 'what' USING ERRCODE = '{state}', DETAIL = 'which', HINT = 'how'; END $$"
    error = raised_by(connection, text)
    for hidden in (
        error,
        wrapped(error, by="orig"),
        wrapped(error, by="cause"),
        wrapped(wrapped(error, by="orig"), by="cause"),
    ):
        assert sqlstate_of(hidden) == state
        new = translated(hidden)
        assert isinstance(new, IdempotencyError)
        assert (type(new).__name__, new.status, new.code) == EXPECTED[state]
        assert getattr(pg_idempotency, type(new).__name__) is type(new)
        assert (str(new), new.detail, new.hint, new.sqlstate) == ("what", "which", "how", state)
        assert new.__cause__ is hidden
        assert sqlstate_of(new) == state
        assert translated(new) is new
    assert set(BY_SQLSTATE) == set(EXPECTED)


def wrapped(error: Exception, by: str) -> Exception:
    """An error as SQLAlchemy and as Django hide it."""
    outer = RuntimeError("of a framework")
    if by == "orig":
        outer.orig = error  # type: ignore[attr-defined]
    else:
        outer.__cause__ = error
    return outer


def test_others_are_passed_on(connection: Any) -> None:
    error = raised_by(connection, "SELECT 1/0")
    assert translated(error) is error
    assert sqlstate_of(error) == "22012"
    plain = ValueError("x")
    assert translated(plain) is plain
    assert sqlstate_of(plain) is None
    looped = ValueError("y")
    looped.__cause__ = plain
    plain.__cause__ = looped
    assert sqlstate_of(plain) is None


def test_json_that_cannot_be_read_is_the_clients_at_the_beginning_only(connection: Any) -> None:
    error = raised_by(connection, "SELECT '{'::json")
    assert translated(error) is error
    assert translated(error, beginning=True).status == 400  # type: ignore[attr-defined]


def test_the_hint_of_the_server_says_when_to_repeat(connection: Any, database: Database) -> None:
    scope = new_scope()
    begin = "SELECT * FROM idempotency.idempotency_begin(%s, %s, %s, actor => %s, lease => '10 minutes')"
    values = (scope.tenant, scope.action, scope.key, scope.actor)
    database.query(begin, *values)
    error = translated(raised_by(connection, begin, *values))
    assert isinstance(error, InFlightError)
    assert error.retry_after is not None
    assert 500 < error.retry_after <= 600
    no_hint = RuntimeError("of a driver")
    no_hint.pgcode = "ID003"  # type: ignore[attr-defined]
    told = translated(no_hint)
    assert isinstance(told, InFlightError)
    assert (told.retry_after, str(told)) == (1, "of a driver")


def test_conflicts(database: Database) -> None:
    for state, expected in [("40001", True), ("40P01", True), ("40002", False), ("23505", False), ("ID005", False)]:
        with database.connect() as other:
            error = raised_by(other, f"DO $$ BEGIN RAISE SQLSTATE '{state}'; END $$")
        assert is_conflict(error) == is_conflict(wrapped(error, by="cause")) == expected
    assert not is_conflict(pg_idempotency.ConflictError("given up", sqlstate="40001"))


def test_errors_of_drivers(connection: Any) -> None:
    error = raised_by(connection, "SELECT 1/0")
    assert is_of_driver(error)
    assert is_of_driver(wrapped(error, by="orig"))
    assert not is_of_driver(ValueError())
    connection.close()
    assert is_of_driver(raised_by(connection, "SELECT 1"))
    assert reached(error) is error


def test_they_can_be_sent_to_another_process() -> None:
    error = InFlightError("in flight", sqlstate="ID003", retry_after=7)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.sqlstate, copy.retry_after) == (InFlightError, "in flight", "ID003", 7)


def test_a_commit_that_was_a_rollback_is_noticed(connection: Any) -> None:
    for _ in range(2):
        session = session_of(connection)
        session.begin()
        with pytest.raises(Exception, match="division by zero"):
            session.fetch(Statement("SELECT 1/%s", (0,)))
        with pytest.raises(RolledBackError) as raised:
            session.commit()
        assert (raised.value.status, raised.value.code) == (500, "TRANSACTION_ROLLED_BACK")
        assert session.is_idle()
        assert not session.is_lost()
