"""What can be sent: keys, requests, answers and lifetimes, over connections of both drivers."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import timedelta
from http import HTTPStatus
from typing import Any

import psycopg
import psycopg2
import psycopg2.extras
import pytest
from pg_idempotency import (
    Answer,
    Digest,
    JsonRequest,
    MismatchError,
    RawJson,
    Refusal,
    Scope,
    first_seen,
    idempotent,
    status,
    store,
)
from psycopg.rows import dict_row
from support import Database, connected, created_database, is_idle, new_scope


def ask(connection: Any, scope: Scope, request: Any = None, answer: Answer = Answer(201), **arguments: Any) -> Answer:
    """The answer to a request whose work is nothing."""
    with idempotent(connection, scope, request, **arguments) as claim:
        if not claim.replayed:
            claim.finish_with(answer)
    assert is_idle(connection)
    assert claim.answer is not None
    return claim.answer


def is_same(connection: Any, first: Any, second: Any) -> bool:
    """Whether two requests with one key are one."""
    scope = new_scope()
    assert not ask(connection, scope, first).replayed
    try:
        return ask(connection, scope, second).replayed
    except MismatchError:
        return False


class TestScope:
    def test_a_key_is_any_visible_ascii(self, connection: Any) -> None:
        for key in (
            str(uuid.uuid4()),
            "100%",
            "%s",
            "%(a)s",
            "it's",
            'a"b',
            "a\\b",
            "\\x00",
            "{a,b}",
            ";--",
            "$1",
            "x" * 255,
        ):
            scope = new_scope(key=key, action=str(uuid.uuid4()))
            assert ask(connection, scope).outcome == "completed"
            assert ask(connection, scope).outcome == "replayed"
            assert status(connection, scope).outcome == "replayed"

    def test_each_part_counts(self, connection: Any) -> None:
        key = str(uuid.uuid4())
        scopes = [
            Scope(action="a", key=key),
            Scope(action="b%s", key=key),
            Scope(action="a", key=key, tenant="ä'%s"),
            Scope(action="a", key=key, actor='"bob" ✓'),
            Scope(action="a", key=key, tenant="ä'%s", actor="b"),
        ]
        assert [ask(connection, scope).outcome for scope in scopes] == ["completed"] * len(scopes)
        assert [ask(connection, scope).outcome for scope in scopes] == ["replayed"] * len(scopes)

    def test_no_tenant_is_the_empty_one(self, connection: Any, scope: Scope) -> None:
        ask(connection, Scope(action="a", key=scope.key))
        assert ask(connection, Scope(action="a", key=scope.key, tenant="", actor="")).replayed

    def test_it_is_made_of_texts(self) -> None:
        wrong: Any
        for wrong in ({"key": uuid.UUID(int=7)}, {"tenant": 7}, {"actor": object()}, {"action": b"a"}):
            with pytest.raises(TypeError, match="made of texts"):
                new_scope(**wrong)

    def test_it_can_be_compared_and_used_as_a_key(self) -> None:
        assert {Scope(action="a", key="k"): 1}[Scope(action="a", key="k", tenant=None)] == 1


class TestRequest:
    def test_text_is_compared_as_json(self, connection: Any) -> None:
        assert is_same(connection, '{"a": 1, "b": [1, 2]}', b'{"b":[1,2],"a":1}')
        assert is_same(connection, '{"a": "ä✓"}', '{"a": "\\u00e4\\u2713"}'.encode())
        assert not is_same(connection, '{"a": 1}', '{"a": "1"}')
        assert not is_same(connection, "[1, 2]", "[2, 1]")

    def test_numbers_are_compared_as_they_were_sent(self, connection: Any) -> None:
        assert not is_same(connection, '{"id": 9007199254740993}', '{"id": 9007199254740992}')
        assert not is_same(connection, "0.1000000000000000055511151231257827", "0.1")
        assert not is_same(connection, {"id": 9007199254740993}, {"id": 9007199254740992})

    def test_values_are_made_into_json(self, connection: Any) -> None:
        assert is_same(
            connection,
            {"a": [1, None, True], "b": 'it\'s 100% \\ "ä"'},
            '{"b": "it\'s 100% \\\\ \\"ä\\"", "a": [1, null, true]}',
        )
        assert is_same(connection, [1, 2], "[1,2]")
        assert is_same(connection, 7, "7")

    def test_none_is_the_same_as_all(self, connection: Any) -> None:
        assert is_same(connection, None, '{"a": 1}')
        assert is_same(connection, '{"a": 1}', None)

    def test_parts_can_be_left_out(self, connection: Any) -> None:
        def request(id: int, at: int) -> JsonRequest:
            return JsonRequest(
                f'{{"id": {id}, "meta": {{"at": {at}, "b": 1}}, "odd.\\"name\\\\": {at}}}',
                [("meta", "at"), ['odd."name\\']],
            )

        assert is_same(connection, request(9007199254740993, 1), request(9007199254740993, 2))
        assert not is_same(connection, request(9007199254740993, 1), request(9007199254740992, 1))
        assert is_same(connection, JsonRequest(b'{"a": 1}'), '{"a":1}')

    def test_paths_are_kept_for_another_attempt(self, connection: Any) -> None:
        request = JsonRequest('{"a": 1, "b": 2}', (path for path in [("b",)]))  # type: ignore[arg-type]
        assert request.omit == (("b",),)
        assert is_same(connection, request, request)
        with pytest.raises(TypeError, match="has a text"):
            JsonRequest("{}", ["meta"])

    def test_a_digest_is_compared(self, connection: Any) -> None:
        assert is_same(connection, Digest(b"\0" * 16), Digest(bytes(16)))
        assert not is_same(connection, Digest(b"\0" * 16), Digest(b"\0" * 15 + b"\\"))
        with pytest.raises(Exception, match="request_hash"):
            ask(connection, new_scope(), Digest(b"short"))
        assert is_idle(connection)


class TestAnswer:
    def test_a_replay_is_the_same(self, connection: Any) -> None:
        bodies: list[Any] = [
            RawJson('{"id": 9007199254740993,  "price": 1.50, "id": 2}'),
            RawJson('"\\u0000"'),
            RawJson("1"),
            b"\0\\\xff\x00'%s",
            b"",
            b"\\x41",
            b"hello \\ world",
            None,
            {"a": ["ä✓", None, 1.5]},
            "it's 100% \\",
            [],
            0,
            False,
            bytearray(b"\0a"),
            memoryview(b"b\0"),
        ]
        for body in bodies:
            scope = new_scope()
            first = ask(connection, scope, None, Answer(200, body))
            repeat = ask(connection, scope)
            assert (first.outcome, repeat.outcome) == ("completed", "replayed")
            assert (repeat.text, repeat.content) == (first.text, first.content)
            assert repeat.json() == first.json()

    def test_json_and_bytes_are_told_apart(self, connection: Any) -> None:
        expected = [
            ("x", '"x"', b'"x"'),
            (RawJson("[1,  2]"), "[1,  2]", b"[1,  2]"),
            (b"[1]", None, b"[1]"),
            (None, None, b""),
        ]
        for body, text, content in expected:
            scope = new_scope()
            for answer in (ask(connection, scope, None, Answer(200, body)), ask(connection, scope)):
                assert (answer.text, answer.content) == (text, content)

    def test_headers_may_come_several_times(self, connection: Any, scope: Scope) -> None:
        headers = {"location": "/orders/%7B1%7D", "link": ["<a>; rel=x", "<b>; rel=y"], "x-odd": 'it\'s \\ "ä"'}
        assert ask(connection, scope, None, Answer(201, None, headers)).headers == headers
        assert ask(connection, scope).headers == headers

    def test_any_status_is_replayed_as_it_was(self, connection: Any) -> None:
        for code in (100, 200, 201, 204, 303, 400, 404, 422, 451):
            scope = new_scope()
            ask(connection, scope, None, Answer(code))
            assert ask(connection, scope).status == code

    def test_a_status_is_a_number_of_http(self, connection: Any, scope: Scope) -> None:
        answer = ask(connection, scope, None, Answer(HTTPStatus.CREATED))
        assert type(answer.status) is int
        assert ask(connection, scope).status == 201
        for wrong in (99, 600, -1):
            with pytest.raises(ValueError, match="from 100 to 599"):
                Answer(wrong)
        for no_number in ("201", 201.5, None):
            with pytest.raises(TypeError):
                Answer(no_number)  # type: ignore[arg-type]

    def test_what_is_no_json_is_refused_early(self) -> None:
        for wrong in (object(), float("nan"), {1, 2}):
            with pytest.raises((TypeError, ValueError)):
                Answer(200, wrong)

    def test_a_refusal_is_an_answer_of_400_and_more(self) -> None:
        assert Refusal(422, {"a": 1}).answer == Answer(422, {"a": 1})
        assert str(Refusal(422)) == "refused with 422"
        for wrong in (200, 399):
            with pytest.raises(ValueError, match="400 or more"):
                Refusal(wrong)


class TestLifetimes:
    def kept(self, database: Database, scope: Scope) -> timedelta:
        ((kept,),) = database.query(
            "SELECT expires_at - finished_at FROM idempotency.idempotency_key WHERE key = %s", scope.key
        )
        assert isinstance(kept, timedelta)
        return kept

    @pytest.mark.parametrize(
        ("ttl", "expected"),
        [
            ("2 hours", timedelta(hours=2)),
            ("1 day", timedelta(days=1)),
            ("PT90M", timedelta(minutes=90)),
            ("600", timedelta(minutes=10)),
            (timedelta(hours=2), timedelta(hours=2)),
            (timedelta(days=2, seconds=1), timedelta(days=2, seconds=1)),
            (timedelta(minutes=5, microseconds=1), timedelta(minutes=5, microseconds=1)),
            (timedelta(days=2, microseconds=999999), timedelta(days=2, microseconds=999999)),
            (None, timedelta(days=1)),
        ],
    )
    def test_an_answer_is_kept_as_long_as_is_said(
        self, connection: Any, database: Database, scope: Scope, ttl: Any, expected: Any
    ) -> None:
        ask(connection, scope, None, Answer(201, ttl=ttl))
        assert self.kept(database, scope) == expected
        other = new_scope()
        ask(connection, other, ttl=ttl)
        assert self.kept(database, other) == expected

    def test_that_of_the_answer_comes_first(self, connection: Any, database: Database, scope: Scope) -> None:
        ask(connection, scope, None, Answer(201, ttl="3 hours"), ttl="2 hours")
        assert self.kept(database, scope) == timedelta(hours=3)
        refused = new_scope()
        ask(connection, refused, None, Answer(404, ttl=timedelta(seconds=20)), ttl="2 hours")
        assert self.kept(database, refused) == timedelta(seconds=20)

    def test_one_out_of_range_is_the_services_own_error(self, connection: Any, scope: Scope) -> None:
        with pytest.raises(Exception, match="ttl") as raised:
            ask(connection, scope, ttl=timedelta(days=-1))
        assert getattr(raised.value, "sqlstate", None) or raised.value.pgcode == "22023"  # type: ignore[attr-defined]
        assert is_idle(connection)


def connected_with(database: Database, driver: str, autocommit: bool, arguments: Any) -> Any:
    """A connection with some arguments; PostgreSQL 19 has no strings any more that are not standard."""
    try:
        return database.connect(driver, autocommit, **arguments)
    except (psycopg.OperationalError, psycopg2.OperationalError) as error:
        if "non-standard string literals are not supported" in str(error):
            pytest.skip(str(error))
        raise


class TestKindsOfConnections:
    """Whatever the application has set up for itself."""

    def check(self, connection: Any) -> None:
        try:
            scope = new_scope()
            answer = Answer(201, {"a": "ä"}, {"x": "1"})
            for outcome in ("completed", "replayed"):
                kept = ask(connection, scope, '{"a": 1}', answer)
                assert (kept.outcome, kept.text, kept.headers) == (outcome, '{"a":"ä"}', {"x": "1"})
            raw = new_scope()
            for _ in range(8):
                assert ask(connection, raw, Digest(b"\0" * 32), Answer(200, b"\0\\'")).content == b"\0\\'"
            assert store(connection, new_scope(), "1", Answer(404)).outcome == "errored"
            assert status(connection, raw).outcome == "replayed"
            assert is_idle(connection)
            with idempotent(connection, new_scope()) as claim:
                ids = first_seen(connection, "c", [raw.key, 'a"b' + raw.key])
                claim.finish(402)
            assert ids == [raw.key, 'a"b' + raw.key]
        finally:
            connection.close()

    @pytest.mark.parametrize(
        "arguments",
        [
            {"row_factory": dict_row},
            {"cursor_factory": psycopg.ClientCursor},
            {"prepare_threshold": 0},
            {"prepare_threshold": None},
            {"options": "-c bytea_output=escape"},
            {"options": "-c standard_conforming_strings=off"},
            {"options": "-c intervalstyle=sql_standard"},
            {"options": "-c search_path=pg_catalog"},
            {"options": "-c default_transaction_isolation=serializable"},
            {"options": "-c default_transaction_isolation=repeatable\\ read"},
        ],
        ids=str,
    )
    def test_of_psycopg(self, database: Database, autocommit: bool, arguments: Any) -> None:
        self.check(connected_with(database, "psycopg", autocommit, arguments))

    @pytest.mark.parametrize(
        "arguments",
        [
            {"cursor_factory": psycopg2.extras.RealDictCursor},
            {"cursor_factory": psycopg2.extras.NamedTupleCursor},
            {"connection_factory": psycopg2.extras.RealDictConnection},
            {"connection_factory": psycopg2.extras.DictConnection},
            {"options": "-c bytea_output=escape"},
            {"options": "-c standard_conforming_strings=off"},
            {"options": "-c intervalstyle=sql_standard"},
            {"options": "-c default_transaction_isolation=serializable"},
            {"options": "-c default_transaction_isolation=repeatable\\ read"},
        ],
        ids=str,
    )
    def test_of_psycopg2(self, database: Database, autocommit: bool, arguments: Any) -> None:
        self.check(connected_with(database, "psycopg2", autocommit, arguments))

    def test_that_read_json_and_intervals_in_their_own_way(self, database: Database, driver: str) -> None:
        connection = database.connect(driver)
        if driver == "psycopg2":
            psycopg2.extras.register_default_json(connection, loads=lambda text: pytest.fail("read as JSON"))
            psycopg2.extras.register_default_jsonb(connection, loads=lambda text: pytest.fail("read as JSON"))
        else:
            psycopg.types.json.set_json_loads(lambda text: pytest.fail("read as JSON"), connection)
        self.check(connection)

    def test_that_have_cursors_of_their_own_in_the_work(self, database: Database) -> None:
        with database.connect("psycopg", row_factory=dict_row) as connection:
            with idempotent(connection, new_scope()) as claim:
                assert connection.execute("SELECT 1 AS one").fetchall() == [{"one": 1}]
                claim.finish()

    def test_in_pipeline_mode_is_refused(self, database: Database, scope: Scope, autocommit: bool) -> None:
        from pg_idempotency import OutOfOrderError

        with database.connect("psycopg", autocommit) as connection:
            with connection.pipeline():
                with pytest.raises(OutOfOrderError, match="pipeline mode"):
                    ask(connection, scope)
            assert ask(connection, scope).outcome == "completed"

    def test_of_nothing_that_is_known(self, database: Database, scope: Scope) -> None:
        for wrong in (None, "dbname=x", object(), database):
            with pytest.raises(TypeError, match="a connection of psycopg or psycopg2 is needed"):
                idempotent(wrong, scope)


class TestSchemas:
    @pytest.fixture(scope="class", params=["Odd näme", "100%s"])
    def odd(self, request: Any) -> Iterator[tuple[Database, str]]:
        with created_database(request.param) as database:
            yield database, request.param

    def test_any_name(self, odd: tuple[Database, str], driver: str) -> None:
        database, schema = odd
        connection = connected(database.url, driver, True)
        scope = new_scope()
        assert ask(connection, scope, "{}", schema=schema).outcome == "completed"
        assert ask(connection, scope, "{}", schema=schema).outcome == "replayed"
        assert store(connection, new_scope(), None, Answer(404), schema=schema).outcome == "errored"
        assert status(connection, scope, schema=schema).outcome == "replayed"
        assert first_seen(connection, "c", [driver], schema=schema) == [driver]
        with pytest.raises(Exception, match="idempotency"):
            ask(connection, scope)
        connection.close()
