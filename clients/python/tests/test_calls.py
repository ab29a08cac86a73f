"""The calls that stand alone: ``store``, ``status`` and ``first_seen``, over connections of both drivers."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from typing import Any

import pytest
from pg_idempotency import (
    Answer,
    Digest,
    InFlightError,
    KeyInvalidError,
    KeyMissingError,
    MismatchError,
    RequestInvalidError,
    Scope,
    UnavailableError,
    first_seen,
    idempotent,
    lease,
    status,
    store,
)
from support import Database, commit, execute, is_idle, new_scope, rollback, until


class TestStore:
    def test_the_first_answer_stays(self, connection: Any, scope: Scope) -> None:
        first = store(connection, scope, '{"a": 1}', Answer(404, "first"))
        assert (first.outcome, first.replayed) == ("errored", False)
        second = store(connection, scope, '{"a":1}', Answer(201, "second"))
        assert (second.outcome, second.status, second.json()) == ("replayed", 404, "first")
        assert is_idle(connection)
        with pytest.raises(MismatchError):
            store(connection, scope, '{"a": 2}', Answer(201))
        assert is_idle(connection)
        assert store(connection, new_scope(), None, Answer(201)).outcome == "completed"
        assert store(connection, new_scope(), None, Answer(503)).outcome == "released"

    def test_it_takes_digests_bytes_headers_and_lifetimes(self, connection: Any, scope: Scope) -> None:
        answer = Answer(200, b"\0\xff", {"content-type": "x/y"}, "2 hours")
        store(connection, scope, Digest(bytes(16)), answer)
        kept = status(connection, scope, Digest(bytes(16)))
        assert kept.answer is not None
        assert (kept.answer.content, kept.answer.headers) == (b"\0\xff", {"content-type": "x/y"})
        assert kept.expires_at is not None
        assert kept.finished_at is not None
        assert kept.expires_at - kept.finished_at == timedelta(hours=2)

    def test_it_tells_what_is_wrong(self, connection: Any, scope: Scope, database: Database) -> None:
        for wrong in ("{", '"\\u0000"', b"\xff"):
            with pytest.raises(RequestInvalidError):
                store(connection, scope, wrong, Answer(404))
        with pytest.raises(KeyMissingError):
            store(connection, new_scope(key=""), None, Answer(404))
        with database.connect() as other, idempotent(other, scope) as claim:
            with pytest.raises(InFlightError):
                store(connection, scope, None, Answer(404))
            claim.finish(201)
        assert is_idle(connection)

    def test_a_connection_that_is_lost(self, connection: Any, scope: Scope, database: Database) -> None:
        database.terminate(connection)
        with pytest.raises(UnavailableError):
            store(connection, scope, None, Answer(404))
        with pytest.raises(UnavailableError):
            store(connection, scope, None, Answer(404))


class TestStatus:
    def test_nothing_is_known(self, connection: Any, scope: Scope) -> None:
        found = status(connection, scope, "{}")
        assert (found.outcome, found.answer, found.retry_after, found.attempt, found.recovery_point) == (
            None,
            None,
            None,
            None,
            None,
        )
        assert (found.created_at, found.finished_at, found.expires_at) == (None, None, None)
        assert is_idle(connection)

    def test_a_transaction_at_work(self, connection: Any, scope: Scope, database: Database) -> None:
        with database.connect() as other, idempotent(other, scope, '{"a": 1}') as claim:
            found = status(connection, scope, '{"a": 1}')
            assert (found.outcome, found.answer) == ("in_flight", None)
            assert found.retry_after is not None
            assert found.retry_after >= 1
            claim.finish(201, {"id": 7})
        found = status(connection, scope)
        assert found.outcome == "replayed"
        assert found.answer is not None
        assert (found.answer.status, found.answer.json(), found.answer.outcome) == (201, {"id": 7}, "replayed")
        assert isinstance(found.finished_at, datetime)
        with pytest.raises(MismatchError):
            status(connection, scope, '{"a": 2}')
        assert is_idle(connection)

    def test_a_lease(self, connection: Any, scope: Scope, database: Database) -> None:
        with database.connect() as other, lease(other, scope) as claim:
            claim.checkpoint("charged", {"id": 7})
            found = status(connection, scope)
            assert (found.outcome, found.attempt) == ("in_flight", 1)
            assert found.recovery_point == "charged"
            database.query(
                "UPDATE idempotency.idempotency_key SET lease_expires_at = now() - interval '1 s' WHERE key = %s",
                scope.key,
            )
            assert status(connection, scope).outcome == "stalled"
            claim.finish()

    def test_it_leaves_the_transaction_of_the_caller_alone(
        self, connection: Any, scope: Scope, autocommit: bool
    ) -> None:
        execute(connection, "BEGIN" if autocommit else "SELECT 1")
        execute(connection, "CREATE TEMPORARY TABLE mine ON COMMIT PRESERVE ROWS AS SELECT 1")
        assert status(connection, scope).outcome is None
        assert not is_idle(connection)
        commit(connection)
        assert execute(connection, "SELECT count(*) FROM mine") == [(1,)]

    def test_it_tells_what_is_wrong(self, connection: Any, scope: Scope) -> None:
        with pytest.raises(KeyInvalidError):
            status(connection, new_scope(key="a b"))
        with pytest.raises(RequestInvalidError):
            status(connection, scope, "{")
        assert is_idle(connection)

    def test_it_works_where_nothing_can_be_written(
        self, database: Database, driver: str, autocommit: bool, scope: Scope
    ) -> None:
        connection = database.connect(driver, autocommit, options="-c default_transaction_read_only=on")
        assert status(connection, scope).outcome is None
        assert is_idle(connection)
        connection.close()

    def test_a_connection_that_is_lost(self, connection: Any, scope: Scope, database: Database) -> None:
        database.terminate(connection)
        with pytest.raises(UnavailableError):
            status(connection, scope)


class TestFirstSeen:
    def test_each_id_comes_once_and_in_order(self, connection: Any, scope: Scope) -> None:
        ids = ["z", "a", 'b"c', "d\\e", "f,g", "{h}", "NULL", "i'j", "100%s", "a", "z"]
        expected = ["z", "a", 'b"c', "d\\e", "f,g", "{h}", "NULL", "i'j", "100%s"]
        consumer = scope.key
        assert first_seen(connection, consumer, iter(ids)) == expected
        if not is_idle(connection):
            commit(connection)
        assert first_seen(connection, consumer, [*ids, "new"]) == ["new"]
        assert first_seen(connection, f"{consumer}-other", ["a"]) == ["a"]
        assert first_seen(connection, consumer, ["a"], tenant="acme", ttl=timedelta(hours=2)) == ["a"]
        assert first_seen(connection, consumer, []) == []

    def test_they_are_forgotten_with_the_transaction(self, connection: Any, scope: Scope, autocommit: bool) -> None:
        for _ in range(2):
            if autocommit:
                execute(connection, "BEGIN")
            assert first_seen(connection, scope.key, ["a"]) == ["a"]
            assert not is_idle(connection)
            rollback(connection)

    def test_in_the_work_of_a_request(self, connection: Any, scope: Scope) -> None:
        for answered in (402, 201):
            with idempotent(connection, new_scope()) as claim:
                assert first_seen(connection, scope.key, ["a"]) == ["a"]
                claim.finish(answered)
        with idempotent(connection, new_scope()) as claim:
            assert first_seen(connection, scope.key, ["a"]) == []
            claim.finish()

    def test_it_tells_what_is_wrong(self, connection: Any, database: Database) -> None:
        with pytest.raises(TypeError, match="the ids are a list"):
            first_seen(connection, "c", "message-7")
        with pytest.raises(KeyInvalidError) as raised:
            first_seen(connection, "c", ["a", "x" * 256])
        assert raised.value.sqlstate == "ID002"
        connection.rollback()
        database.terminate(connection)
        with pytest.raises(UnavailableError):
            first_seen(connection, "c", ["a"])

    def test_two_consumers_at_once_share_the_messages(self, database: Database, driver: str, scope: Scope) -> None:
        first, second = database.connect(driver, False), database.connect(driver, False)
        assert first_seen(first, scope.key, ["a", "b"]) == ["a", "b"]
        found: list[str] = []
        other = threading.Thread(target=lambda: found.extend(first_seen(second, scope.key, ["b", "c"])))
        other.start()
        until(lambda: database.waits("idempotency_first_seen"))
        first.commit()
        other.join()
        assert found == ["c"]
        first.close()
        second.close()
