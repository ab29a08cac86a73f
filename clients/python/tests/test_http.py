"""What the adapters for HTTP have in common, with requests and answers made by hand."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from pg_idempotency import (
    Answer,
    ClaimLostError,
    ConflictError,
    Digest,
    IdempotencyError,
    InFlightError,
    KeyInvalidError,
    KeyMissingError,
    MismatchError,
    OutOfOrderError,
    RawJson,
    RequestInvalidError,
    Scope,
    UnavailableError,
    UnfinishedError,
    idempotent,
)
from pg_idempotency.http import SAFE_METHODS, HttpOptions, Problem, Response, checked_id, is_json
from support import Database, new_scope


class TestKey:
    @pytest.mark.parametrize(
        ("values", "error"),
        [
            ([], KeyMissingError),
            ([""], KeyMissingError),
            (["  \t"], KeyMissingError),
            (['""'], KeyMissingError),
            (['" "'], KeyMissingError),
            (["a", "b"], KeyInvalidError),
            (["a", "a"], KeyInvalidError),
            (["x" * 256], KeyInvalidError),
            (["a b"], KeyInvalidError),
            (["ä"], KeyInvalidError),
            (["a\0"], KeyInvalidError),
            (["a\nb"], KeyInvalidError),
        ],
    )
    def test_is_refused(self, values: list[str], error: Any) -> None:
        options = HttpOptions()
        with pytest.raises(error) as raised:
            options.key_of(values)
        response = options.problem_of(raised.value)
        assert response.status == 400
        assert dict(response.headers) == {"content-type": "application/problem+json"}
        assert json.loads(response.body) == {
            "type": "about:blank",
            "title": error.title,
            "status": 400,
            "detail": str(raised.value),
            "code": error.code,
        }

    def test_is_taken_out_of_quotes(self) -> None:
        for value in ("abc", '"abc"', " abc ", ' " abc " '):
            assert HttpOptions().key_of([value]) == "abc"
        assert HttpOptions().key_of(['"']) == '"'
        assert HttpOptions().key_of(["", "abc"]) == "abc"

    def test_is_refused_with_a_comma_where_several_would_be_joined(self) -> None:
        assert HttpOptions().key_of(["a,b"]) == "a,b"
        with pytest.raises(KeyInvalidError, match="more than once"):
            HttpOptions().key_of(["a,b"], joined=True)
        assert HttpOptions().key_of(["ab"], joined=True) == "ab"

    @pytest.mark.parametrize(
        ("options", "key", "good"),
        [
            ({"key_format": "uuid"}, "8e03978e-40d5-43dd-bc93-6894a57f9324", True),
            ({"key_format": "uuid"}, "8E03978E-40D5-43DD-BC93-6894A57F9324", True),
            ({"key_format": "uuid"}, "8e03978e-40d5-43dd-bc93-6894a57f932", False),
            ({"key_format": "uuid"}, "x8e03978e-40d5-43dd-bc93-6894a57f9324", False),
            ({"key_format": "slug"}, "a-b_1", True),
            ({"key_format": "slug"}, "a.b", False),
            ({"key_format": re.compile(r"k\d+")}, "k12", True),
            ({"key_format": re.compile(r"k\d+")}, "k12x", False),
            ({"key_min_length": 16}, "x" * 16, True),
            ({"key_min_length": 16}, "x" * 15, False),
            ({"key_max_length": 20}, "x" * 20, True),
            ({"key_max_length": 20}, "x" * 21, False),
        ],
    )
    def test_has_the_form_that_is_asked_for(self, options: Any, key: str, good: bool) -> None:
        if good:
            assert HttpOptions(**options).key_of([key]) == key
        else:
            with pytest.raises(KeyInvalidError):
                HttpOptions(**options).key_of([key])

    def test_comes_in_the_header_that_is_named(self) -> None:
        assert HttpOptions().names == ("Idempotency-Key",)
        assert HttpOptions(header="X-Key").names == ("X-Key",)
        options = HttpOptions(header=["X-Idempotency-Key", "X-Request-Key"])
        assert options.names == ("X-Idempotency-Key", "X-Request-Key")
        with pytest.raises(KeyMissingError, match="the header X-Idempotency-Key is missing"):
            options.key_of([])

    def test_need_not_be_there_where_it_is_optional(self) -> None:
        for values in ([], [""], ['""']):
            assert HttpOptions(required=False).key_of(values) is None
        assert HttpOptions(required=False).key_of(["a"]) == "a"
        with pytest.raises(KeyInvalidError):
            HttpOptions(required=False).key_of(["a b"])
        assert {"GET", "HEAD", "OPTIONS", "TRACE"} == SAFE_METHODS


class TestWhose:
    def test_somebody(self) -> None:
        for value, expected in [("alice", "alice"), (7, "7"), (0, "0"), (UUID(int=7), str(UUID(int=7))), (None, None)]:
            assert checked_id("actor", value) == expected

    def test_nobody(self) -> None:
        for value in ("", True, False, 1.5, b"alice", object(), [], lambda: 1):
            with pytest.raises(TypeError, match="actor is"):
                checked_id("actor", value)


class TestFingerprint:
    first: Any = {
        "params": {"id": 1},
        "query": [("a", "1")],
        "content_type": "application/json",
        "body": b'{"id": 9007199254740993, "sent_at": 1}',
    }

    def is_same(self, connection: Any, first: Any, second: Any) -> bool:
        """Whether two fingerprints are one for the database."""
        scope = new_scope()
        with idempotent(connection, scope, first) as claim:
            claim.finish()
        try:
            with idempotent(connection, scope, second) as claim:
                return claim.replayed
        except MismatchError:
            return False

    @pytest.fixture
    def connection(self, database: Database) -> Any:
        with database.connect() as connection:
            yield connection

    @pytest.mark.parametrize(
        ("change", "same"),
        [
            ({"body": b'{"sent_at":1,"id":9007199254740993}'}, True),
            ({"content_type": "application/json; charset=utf-8"}, True),
            ({"content_type": "Application/Problem+JSON"}, True),
            ({"params": {"id": "1"}}, True),
            ({"body": b'{"id": 9007199254740992, "sent_at": 1}'}, False),
            ({"body": b'{"id": 9007199254740993, "sent_at": 2}'}, False),
            ({"params": {"id": 2}}, False),
            ({"params": {}}, False),
            ({"query": [("a", "2")]}, False),
            ({"query": [("a", "1"), ("a", "1")]}, False),
            ({"query": []}, False),
            ({"body": b""}, False),
            ({"content_type": "text/plain"}, False),
            ({"encoded": True}, False),
        ],
    )
    def test_is_that_of_the_whole_request(self, connection: Any, change: Any, same: bool) -> None:
        options = HttpOptions()
        assert (
            self.is_same(
                connection, options.fingerprint_of(**self.first), options.fingerprint_of(**{**self.first, **change})
            )
            == same
        )

    def test_of_requests_that_have_little(self, connection: Any) -> None:
        options = HttpOptions()
        bodies = [
            options.fingerprint_of({}, [], "application/json", body) for body in (b"1", b"2", b"", b'{"params": {}}')
        ]
        for first in bodies:
            assert [self.is_same(connection, first, second) for second in bodies] == [
                first is second for second in bodies
            ]

    def test_leaves_out_what_does_not_count(self, connection: Any) -> None:
        options = HttpOptions(omit=["body.sent_at", ["query", "a.b"]])
        first = options.fingerprint_of({"id": 1}, [("a.b", "1")], "application/json", b'{"id": 1, "sent_at": 1}')
        second = options.fingerprint_of({"id": 1}, [("a.b", "2")], "application/json", b'{"id": 1, "sent_at": 2}')
        third = options.fingerprint_of({"id": 1}, [("a.b", "2")], "application/json", b'{"id": 2, "sent_at": 2}')
        assert self.is_same(connection, first, second)
        assert not self.is_same(connection, first, third)
        for wrong in ("sent_at", "headers.x", ()):
            with pytest.raises(ValueError, match="begins with params, query or body"):
                HttpOptions(omit=[wrong])

    def test_is_of_the_bytes_of_what_is_not_json(self) -> None:
        def form(body: bytes, kind: str = "application/x-www-form-urlencoded", **change: Any) -> Any:
            return HttpOptions().fingerprint_of(
                **{"params": {}, "query": [], "content_type": kind, "body": body, **change}
            )

        assert isinstance(form(b"a=1"), Digest)
        assert len(form(b"a=1").value) == 32
        assert form(b"a=1") == form(b"a=1", "Application/x-www-form-urlencoded; charset=utf-8")
        different = [
            form(b"a=1"),
            form(b"a=2"),
            form(b"a=1", "text/plain"),
            form(b"a=1", params={"id": 1}),
            form(b"a=1", query=[("a", "1")]),
        ]
        assert len({digest.value for digest in different}) == len(different)
        assert form(b'{"a":1}', "application/json", encoded=True) != form(b'{"a":1}', "application/json")

    @pytest.mark.parametrize(
        "body",
        [
            b'{"a":',
            b'1,"params":{}',
            b"nul",
            b"NaN",
            b'{"a": Infinity}',
            b"-Infinity",
            b"\xff",
            b"[" * 100000,
            b'"\x01"',
            b"\xef\xbb\xbf{}",
            b"'a'",
        ],
    )
    def test_refuses_what_should_be_json_and_is_not(self, body: bytes) -> None:
        for params in ({}, {"id": 1}):
            with pytest.raises(RequestInvalidError):
                HttpOptions().fingerprint_of(params, [], "application/json", body)

    def test_the_database_refuses_what_it_cannot_hold(self, connection: Any) -> None:
        for body in (b'"\\u0000"', b'{"a":1e400000}', b'"\\ud800"', b"[" * 900 + b"1" * 200000 + b"]" * 900):
            request = HttpOptions().fingerprint_of({}, [], "application/json", body)
            with pytest.raises(RequestInvalidError):
                with idempotent(connection, new_scope(), request):
                    pytest.fail("the work must not run")


class TestAnswer:
    json_headers = [("content-type", "application/json")]

    @pytest.mark.parametrize(
        "response",
        [
            Response(201, [("content-type", "application/json")], b'{"a":  9007199254740993}'),
            Response(200, [("content-type", "application/json")], '"ä"'.encode()),
            Response(200, [("content-type", "application/json; charset=utf-8")], b"[]"),
            Response(200, [("content-type", "application/vnd.api+json")], b'{"data": []}'),
            Response(200, [("content-type", "text/csv")], b"a,b\n1,2\n"),
            Response(200, [("content-type", "image/png")], bytes([0, 255, 13, 92])),
            Response(200, [("content-type", "application/json"), ("content-encoding", "gzip")], bytes([31, 139])),
            Response(200, [("content-type", "application/json")], b"no JSON"),
            Response(200, [("content-type", "application/json")], b"NaN"),
            Response(200, [("content-type", "application/json")], b""),
            Response(204, [], b""),
            Response(303, [("location", "/")], b""),
            Response(404, [("content-type", "application/json")], b'{"no": 1}'),
            Response(
                201, [("link", "<a>"), ("link", "<b>"), ("etag", '"1"'), ("content-type", "application/json")], b"1"
            ),
        ],
        ids=lambda response: f"{response.status} {response.body[:10]!r}",
    )
    def test_may_be_anything(self, database: Database, response: Response) -> None:
        options = HttpOptions()
        scope = new_scope()
        with database.connect() as connection:
            with idempotent(connection, scope) as claim:
                claim.finish_with(options.answer_of(response))
            first = options.response_of(claim.answer)  # type: ignore[arg-type]
            with idempotent(connection, scope) as claim:
                assert claim.replayed
            repeat = options.response_of(claim.answer)  # type: ignore[arg-type]
        assert (first.status, sorted(first.headers), first.body) == (
            response.status,
            sorted(response.headers),
            response.body,
        )
        assert (repeat.status, repeat.body) == (response.status, response.body)
        assert sorted(repeat.headers) == sorted([*response.headers, ("idempotent-replayed", "true")])

    def test_json_is_kept_as_text(self) -> None:
        answer = HttpOptions().answer_of(Response(200, self.json_headers, b'{"a":  1}'))
        assert (answer.body, answer.headers) == (RawJson('{"a":  1}'), None)
        assert isinstance(answer.body, RawJson)

    def test_has_only_the_headers_that_belong_to_it(self) -> None:
        sent = [
            ("location", "/1"),
            ("x-total", "5"),
            ("set-cookie", "a=1"),
            ("date", "now"),
            ("x-request-id", "7"),
            ("x-other", "1"),
        ]
        answer = HttpOptions(replay_headers=["X-Total"]).answer_of(Response(201, sent, b""))
        assert answer.headers == {"location": "/1", "x-total": "5"}

    @pytest.mark.parametrize(
        "name",
        [
            "Set-Cookie",
            "Date",
            "Age",
            "Authorization",
            "WWW-Authenticate",
            "X-RateLimit-Limit",
            "RateLimit",
            "X-Rate-Limit",
            "Retry-After",
            "X-Request-Id",
            "X-Correlation-ID",
            "traceparent",
            "Content-Length",
            "Transfer-Encoding",
            "Connection",
            "Access-Control-Allow-Origin",
        ],
    )
    def test_what_belongs_to_one_connection_is_never_kept(self, name: str) -> None:
        with pytest.raises(ValueError, match="must not be replayed"):
            HttpOptions(replay_headers=[name])

    def test_is_kept_as_long_as_is_said_for_its_status(self) -> None:
        options = HttpOptions(ttl={"2xx": "2 hours", 404: timedelta(seconds=10), "4xx": "20 s"})
        assert [options.ttl_of(code) for code in (201, 404, 402, 302)] == [
            "2 hours",
            timedelta(seconds=10),
            "20 s",
            None,
        ]
        assert options.answer_of(Response(404, [], b"")).ttl == timedelta(seconds=10)

    def test_a_replay_is_marked_as_is_said(self) -> None:
        replay = Answer(200, outcome="replayed")
        assert HttpOptions().response_of(replay).headers == [("idempotent-replayed", "true")]
        assert HttpOptions(marker="X-Replay").response_of(replay).headers == [("x-replay", "true")]
        assert HttpOptions(marker=None).response_of(replay).headers == []
        assert HttpOptions().response_of(Answer(200, outcome="completed")).headers == []

    def test_content_types_of_json(self) -> None:
        for kind in (
            "application/json",
            "application/json;charset=utf-8",
            "application/json ; x=y",
            "APPLICATION/LD+JSON",
        ):
            assert is_json(kind)
        for kind in (
            "",
            "text/json5",
            "application/jsonl",
            "application/x-json-seq",
            "text/plain; x=application/json",
            "json",
        ):
            assert not is_json(kind)


class TestProblem:
    def told(self, options: HttpOptions, error: IdempotencyError) -> tuple[int, dict[str, str], Any]:
        response = options.problem_of(error)
        return response.status, dict(response.headers), json.loads(response.body)

    def test_of_a_request_in_flight_says_when_to_repeat_it(self) -> None:
        status, headers, body = self.told(HttpOptions(), InFlightError("in flight", retry_after=3))
        assert (status, headers["retry-after"], body["code"]) == (409, "3", "DUPLICATE_IN_PROGRESS")
        assert self.told(HttpOptions(), InFlightError("in flight", retry_after=300))[1]["retry-after"] == "10"
        assert (
            self.told(HttpOptions(max_retry_after=1000), InFlightError("in flight", retry_after=300))[1]["retry-after"]
            == "300"
        )

    def test_that_may_pass_says_so(self) -> None:
        for error in (UnavailableError("x"), ConflictError("x")):
            assert self.told(HttpOptions(), error)[1]["retry-after"] == "1"
        for final in (MismatchError("x"), UnfinishedError("x"), ClaimLostError("x")):
            assert "retry-after" not in self.told(HttpOptions(), final)[1]

    def test_of_a_key_used_again(self) -> None:
        title = "The idempotency key was used with a different request"
        for mismatch_status in (422, 409):
            status, _, body = self.told(HttpOptions(mismatch_status=mismatch_status), MismatchError("of the database"))
            assert status == mismatch_status
            assert body == {
                "type": "about:blank",
                "title": title,
                "status": status,
                "detail": title,
                "code": "IDEMPOTENCY_KEY_REUSED",
            }

    def test_does_not_tell_what_the_database_said(self) -> None:
        for error in (
            OutOfOrderError("secret"),
            UnavailableError("secret"),
            ClaimLostError("secret"),
            UnfinishedError("secret"),
        ):
            assert "secret" not in json.dumps(self.told(HttpOptions(), error))

    def test_is_written_as_the_api_writes_its_errors(self) -> None:
        def own(problem: Problem) -> tuple[str, Any]:
            return "application/json", {
                "code": problem.code,
                "error": problem.title,
                "reason": problem.detail,
                "after": problem.retry_after,
            }

        status, headers, body = self.told(HttpOptions(problem=own), KeyMissingError("the header is missing"))
        assert (status, headers) == (400, {"content-type": "application/json"})
        assert body == {
            "code": "IDEMPOTENCY_KEY_MISSING",
            "error": "The idempotency key is missing",
            "reason": "the header is missing",
            "after": None,
        }


class TestOptions:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"header": ()},
            {"key_format": "guid"},
            {"mismatch_status": 400},
            {"ttl": {"4XX": "1 h"}},
            {"ttl": {"404": "1 h"}},
            {"ttl": {600: "1 h"}},
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, wrong: Any) -> None:
        with pytest.raises(ValueError):
            HttpOptions(**wrong)

    def test_they_do_not_share_what_can_change(self) -> None:
        assert HttpOptions().ttl == {}
        assert HttpOptions().ttl is not HttpOptions().ttl
        assert Scope(action="a", key=str(uuid4())) != Scope(action="a", key=str(uuid4()))
