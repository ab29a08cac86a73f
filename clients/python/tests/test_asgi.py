"""The middleware for ASGI, around an application of Starlette and around bare ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from pg_idempotency.asgi import IdempotencyMiddleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class Opened:
    """A connection of a service, as a pool hands it out."""

    def __init__(self, pool: Service) -> None:
        self.pool = pool

    async def __aenter__(self) -> Any:
        self.connection = await psycopg.AsyncConnection.connect(self.pool.url)
        self.pool.out += 1
        self.pool.most = max(self.pool.most, self.pool.out)
        return self.connection

    async def __aexit__(self, *error: Any) -> None:
        self.pool.out -= 1
        await self.connection.close()


class Service:
    """An application behind the middleware, and a client for it."""

    def __init__(self, database: Any, app: Any = None, **options: Any) -> None:
        self.url = database.url
        self.database = database
        self.calls = 0
        self.out = 0
        self.most = 0
        self.app = IdempotencyMiddleware(
            app or self.routes(), connect=self.connect, actor=lambda scope: "alice", **options
        )

    def connect(self) -> Opened:
        return Opened(self)

    def routes(self) -> Any:
        async def create(request: Request) -> Response:
            self.calls += 1
            sent = await request.json()
            await request.scope["idempotency"].connection.execute("INSERT INTO orders VALUES (%s)", [sent["sku"]])
            if sent["sku"] == "sold-out":
                return JSONResponse({"error": "sold out"}, 422)
            if sent["sku"] == "broken":
                raise ZeroDivisionError
            if sent["sku"] == "later":
                return JSONResponse({}, 503)
            response = JSONResponse({"sku": sent["sku"], "n": self.calls}, 201, {"Location": "/orders/1"})
            response.set_cookie("session", "secret")
            return response

        async def stream(request: Request) -> Response:
            async def parts() -> Any:
                for part in (b"a\x00", b"\\", "é".encode()):
                    yield part

            return StreamingResponse(parts(), media_type="text/csv")

        async def large(request: Request) -> Response:
            return Response(b"x" * 1001)

        async def file(request: Request) -> Response:
            return FileResponse(__file__)

        async def conflict(request: Request) -> Response:
            self.calls += 1
            await request.scope["idempotency"].connection.execute(
                "DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"
            )
            return Response()

        async def lost(request: Request) -> Response:
            self.calls += 1
            pid = request.scope["idempotency"].connection.info.backend_pid
            self.database.query("SELECT pg_terminate_backend(%s, 5000)", pid)
            return Response(status_code=204)

        async def unprotected(request: Request) -> Response:
            self.calls += 1
            return JSONResponse("idempotency" in request.scope)

        return Starlette(
            routes=[
                Route("/orders", create, methods=["POST"]),
                Route("/orders", unprotected, methods=["GET"]),
                Route("/unprotected", unprotected, methods=["POST"]),
                Route("/stream", stream, methods=["POST"]),
                Route("/large", large, methods=["POST"]),
                Route("/file", file, methods=["POST"]),
                Route("/conflict", conflict, methods=["POST"]),
                Route("/lost", lost, methods=["POST"]),
            ]
        )

    def send(self, *requests: dict[str, Any]) -> list[httpx.Response]:
        """Send requests at once, each with the arguments of httpx."""

        async def all_of_them() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
                return await asyncio.gather(*(client.request(**request) for request in requests))

        return asyncio.run(all_of_them())

    def post(self, path: str, key: str | None = None, **arguments: Any) -> httpx.Response:
        headers = [] if key is None else [("Idempotency-Key", key)]
        (response,) = self.send({"method": "POST", "url": path, "headers": headers, **arguments})
        return response


@pytest.fixture(scope="module", autouse=True)
def tables(database: Any) -> None:
    database.query("CREATE TABLE orders (sku text)")


@pytest.fixture
def service(database: Any) -> Iterator[Service]:
    database.query("TRUNCATE orders")
    service = Service(database)
    yield service
    assert service.out == 0


def orders(database: Any) -> list[str]:
    return [sku for (sku,) in database.query("SELECT sku FROM orders")]


def test_a_repeat_gets_the_same_answer(service: Service, database: Any) -> None:
    key = str(uuid4())
    first = service.post("/orders", key, json={"sku": "a"})
    second = service.post("/orders", key, content='{ "sku" : "a" }', headers=[
        ("Idempotency-Key", f'"{key}"'), ("Content-Type", "application/json")])
    assert (first.status_code, first.content) == (201, b'{"sku":"a","n":1}')
    assert (second.status_code, second.content) == (201, first.content)
    assert second.headers["location"] == "/orders/1"
    assert second.headers["content-type"] == "application/json"
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert "set-cookie" in first.headers and "set-cookie" not in second.headers
    assert service.calls == 1
    assert orders(database) == ["a"]


def test_ten_at_once_do_the_work_one_time(service: Service, database: Any) -> None:
    request = {"method": "POST", "url": "/orders", "headers": {"Idempotency-Key": str(uuid4())}, "json": {"sku": "b"}}
    answers = service.send(*[request] * 10)
    assert orders(database) == ["b"]
    assert service.calls == 1
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert [answer.status_code for answer in answers].count(201) >= 1
    for answer in answers:
        if answer.status_code == 409:
            assert answer.json()["code"] == "DUPLICATE_IN_PROGRESS"
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["content-type"] == "application/problem+json"


def test_another_request_is_refused(service: Service) -> None:
    key = str(uuid4())
    json_type = ("Content-Type", "application/json")
    numbers = ["9007199254740993", "9007199254740992"]
    answers = [
        service.post("/orders", content=f'{{"sku": "c", "n": {number}}}', headers=[("Idempotency-Key", key), json_type])
        for number in numbers
    ]
    assert [answer.status_code for answer in answers] == [201, 422]
    assert answers[1].json()["code"] == "IDEMPOTENCY_KEY_REUSED"
    assert service.post("/orders?a=1", key, json={"sku": "c"}).status_code == 422


def test_a_failure_is_kept_without_its_rows(service: Service, database: Any) -> None:
    key = str(uuid4())
    for calls in (1, 1):
        answer = service.post("/orders", key, json={"sku": "sold-out"})
        assert (answer.status_code, answer.json(), service.calls) == (422, {"error": "sold out"}, calls)
    assert orders(database) == []


def test_a_failure_of_the_service_is_not_kept(service: Service, database: Any) -> None:
    key = str(uuid4())
    for calls in (1, 2):
        assert service.post("/orders", key, json={"sku": "later"}).status_code == 503
        assert service.calls == calls
    with pytest.raises(ZeroDivisionError):
        service.post("/orders", str(uuid4()), json={"sku": "broken"})
    assert orders(database) == []


@pytest.mark.parametrize(
    "headers, code",
    [
        ([], "IDEMPOTENCY_KEY_MISSING"),
        ([("Idempotency-Key", " ")], "IDEMPOTENCY_KEY_MISSING"),
        ([("Idempotency-Key", '""')], "IDEMPOTENCY_KEY_MISSING"),
        ([("Idempotency-Key", "a"), ("Idempotency-Key", "a")], "IDEMPOTENCY_KEY_INVALID"),
        ([("Idempotency-Key", "a b")], "IDEMPOTENCY_KEY_INVALID"),
        ([("Idempotency-Key", "k" * 256)], "IDEMPOTENCY_KEY_INVALID"),
    ],
)
def test_a_key_that_is_missing_or_malformed(service: Service, headers: Any, code: str) -> None:
    answer = service.post("/orders", headers=headers, json={"sku": "d"})
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert service.calls == 0


def test_safe_methods_and_optional_keys(service: Service, database: Any) -> None:
    (answer,) = service.send({"method": "GET", "url": "/orders", "headers": {"Idempotency-Key": "x"}})
    assert answer.json() is False
    assert Service(database, required=False).post("/unprotected").json() is False
    assert service.most == 0


def test_bytes_and_streams_are_replayed_as_they_were(service: Service) -> None:
    key = str(uuid4())
    for _ in range(2):
        answer = service.post("/stream", key)
        assert answer.content == b"a\x00\\\xc3\xa9"
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"


def test_a_file_is_collected(service: Service) -> None:
    key = str(uuid4())
    for _ in range(2):
        assert b"test_a_file_is_collected" in service.post("/file", key).content


def test_what_is_too_large(database: Any) -> None:
    service = Service(database, max_answer=1000, max_body=10)
    key = str(uuid4())
    answer = service.post("/large", key)
    assert (answer.status_code, answer.json()["code"]) == (500, "ANSWER_TOO_LARGE")
    answer = service.post("/large", key, content="x" * 11)
    assert (answer.status_code, answer.json()["code"]) == (413, "REQUEST_TOO_LARGE")


def test_a_body_that_is_not_json(service: Service) -> None:
    for content in ("{", '{"a": NaN}', '1, "query": 2', b'"\xff"', '{"sku": "\\u0000"}'):
        answer = service.post("/orders", headers=[("Idempotency-Key", str(uuid4())), ("Content-Type", "application/json")],
                              content=content)
        assert (answer.status_code, answer.json()["code"]) == (400, "REQUEST_INVALID"), content
    assert service.calls == 0


def test_after_a_conflict_the_client_repeats(service: Service) -> None:
    answer = service.post("/conflict", str(uuid4()))
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "TRANSACTION_CONFLICT", "1")
    assert service.calls == 1


def test_a_lost_connection_is_told(service: Service, database: Any) -> None:
    answer = service.post("/lost", str(uuid4()))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert service.calls == 1


def test_others_have_keys_of_their_own(database: Any) -> None:
    key = str(uuid4())
    service = Service(database)
    other = Service(database)
    other.app = IdempotencyMiddleware(
        other.routes(), connect=other.connect, tenant=lambda scope: "acme", actor=lambda scope: "bob"
    )
    assert service.post("/orders", key, json={"sku": "e"}).status_code == 201
    assert "idempotent-replayed" not in other.post("/orders", key, json={"sku": "e"}).headers


def test_a_stranger_has_no_scope(database: Any) -> None:
    class Anonymous:
        pass

    service = Service(database)
    for nobody in (Anonymous(), "", False):
        service.app = IdempotencyMiddleware(
            service.routes(), connect=service.connect, actor=lambda scope, nobody=nobody: nobody
        )
        with pytest.raises(TypeError, match="actor"):
            service.post("/orders", "k", json={"sku": "f"})
    with pytest.raises(TypeError, match="tenant or actor"):
        IdempotencyMiddleware(service.routes(), connect=service.connect)


def test_an_answer_that_was_not_completed_is_not_kept(database: Any) -> None:
    async def gives_up(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    service = Service(database, gives_up)
    key = str(uuid4())
    with pytest.raises(RuntimeError, match="complete"):
        service.post("/", key)
    assert database.query("SELECT FROM idempotency.idempotency_key WHERE key = %s", key) == []


def test_nothing_is_sent_before_the_commit(database: Any) -> None:
    key = str(uuid4())
    seen: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert await receive() == {"type": "http.request", "body": b'{"a": 1}', "more_body": False}
        assert scope["extensions"] == {}  # a file that the server sends by itself could not be kept
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps("done").encode()})

    async def send(message: Any) -> None:
        seen.append(len(database.query("SELECT FROM idempotency.idempotency_key WHERE key = %s", key)))

    async def receive() -> Any:
        return parts.pop(0)

    parts = [
        {"type": "http.request", "body": b'{"a"', "more_body": True},
        {"type": "http.request", "body": b": 1}", "more_body": False},
    ]
    service = Service(database, app)
    headers = [(b"idempotency-key", key.encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    scope["extensions"] = {"http.response.pathsend": {}}
    asyncio.run(service.app(scope, receive, send))
    assert seen == [1, 1]


def test_other_kinds_of_connection_pass() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(scope["type"])

    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message)

    middleware = IdempotencyMiddleware(app, connect=None, tenant=lambda scope: None)
    asyncio.run(middleware({"type": "websocket"}, None, send))
    assert sent == ["websocket"]
