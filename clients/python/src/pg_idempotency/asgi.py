"""
Middleware for ASGI applications, such as those of Starlette and FastAPI::

    pool = AsyncConnectionPool(...)
    app.add_middleware(IdempotencyMiddleware, connect=pool.connection, actor=lambda scope: scope["user"].id)

    async def create_order(request):
        connection = request.scope["idempotency"].connection
        await connection.execute("INSERT ...")
        return JSONResponse({"id": 7}, 201)

The application is called inside a transaction that has begun the request, and gets its connection. Its
answer is collected, kept in the same transaction, and leaves after COMMIT. So it has to come behind what
authenticates, and an application cannot stream.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from . import aio
from .errors import AnswerTooLargeError, ConflictError, IdempotencyError
from .http import SAFE_METHODS, HttpOptions, Response, checked_id
from .types import Answer, Request, Scope

AsgiScope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[AsgiScope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Protected:
    """
    What the application finds in ``scope["idempotency"]``.

    connection: the connection with the transaction of the request.
    scope: what the request is known by.
    """

    connection: Any
    scope: Scope

    @property
    def key(self) -> str:
        """The key that the client sent."""
        return self.scope.key


class RequestTooLargeError(IdempotencyError):
    """The body of the request is larger than ``max_body``."""

    status = 413
    code = "REQUEST_TOO_LARGE"
    title = "The request is too large"


class IdempotencyMiddleware:
    """
    Runs an application once for each request that comes with a key.

    connect: opens a connection, such as ``pool.connection`` of psycopg's ``AsyncConnectionPool``.
    tenant, actor: say from the ASGI scope of a request whose it is, from the log-in. One of them has to be
        given; None, which they may return, says that there is none.
    action: says from the ASGI scope what the operation is; by default the method and the path.
    protects: says from the ASGI scope whether a request is protected; by default all whose method is not safe.
    max_body: the largest body of a request, in bytes.
    options: those of ``HttpOptions``.

    An application is not called twice: after a conflict of transactions the client is told to repeat (503).
    What the application raises rolls back, and is passed on. Raises TypeError if nobody says whose a request is.
    """

    def __init__(
        self,
        app: App,
        *,
        connect: Any,
        tenant: Callable[[AsgiScope], Any] | None = None,
        actor: Callable[[AsgiScope], Any] | None = None,
        action: Callable[[AsgiScope], str] | None = None,
        protects: Callable[[AsgiScope], bool] | None = None,
        max_body: int = 1024 * 1024,
        **options: Any,
    ) -> None:
        if tenant is None and actor is None:
            raise TypeError(
                "say whose a request is, by tenant or actor; for an API without users, tenant=lambda scope: None"
            )
        self._app = app
        self._connect = connect
        self._tenant = tenant or _nobody
        self._actor = actor or _nobody
        self._action = action or (lambda scope: f"{scope['method']} {scope['path']}")
        self._protects = protects or (lambda scope: scope["method"] not in SAFE_METHODS)
        self._max_body = max_body
        self._options = HttpOptions(**options)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._protects(scope):
            await self._app(scope, receive, send)
            return
        try:
            key = self._options.key_of(_values(scope, *self._options.names))
            if key is None:
                await self._app(scope, receive, send)
                return
            body = await _body(receive, self._max_body)
            if body is None:
                return  # the client is gone, and nothing was begun
            known_by = Scope(
                tenant=checked_id("tenant", self._tenant(scope)),
                actor=checked_id("actor", self._actor(scope)),
                action=self._action(scope),
                key=key,
            )
            response = await self._run(scope, known_by, self._compared(scope, body), body, receive)
        except IdempotencyError as error:
            response = self._options.problem_of(error)
        await _send(response, send)

    def _compared(self, scope: AsgiScope, body: bytes) -> Request:
        return self._options.fingerprint_of(
            {},
            parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True),
            (_values(scope, "content-type") or [""])[0],
            body,
            encoded=bool(_values(scope, "content-encoding")),
        )

    async def _run(
        self, scope: AsgiScope, known_by: Scope, request: Request, body: bytes, receive: Receive
    ) -> Response:
        """The answer of the application once it is committed, or that of an earlier request."""
        own: Response | None = None

        async def work(connection: Any) -> Answer:
            nonlocal own
            if own is not None:
                raise ConflictError("the transaction was rolled back, and the application cannot run again")
            scope["idempotency"] = Protected(connection, known_by)
            scope["extensions"] = {}  # such as sending a file by its path, which could not be collected
            own = await self._collected(scope, _again(body, receive))
            return self._options.answer_of(own)

        answer = await aio.run(
            self._connect, known_by, request, work, wait=self._options.wait, retries=0, schema=self._options.schema
        )
        return self._options.response_of(answer) if own is None or answer.replayed else own

    async def _collected(self, scope: AsgiScope, receive: Receive) -> Response:
        """Call the application, and collect its answer. Raises AnswerTooLargeError."""
        status: int | None = None
        headers: list[tuple[str, str]] = []
        parts: list[bytes] = []
        size = 0
        complete = False

        async def send(message: Message) -> None:
            nonlocal status, headers, size, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [
                    (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in message["headers"]
                ]
            elif message["type"] == "http.response.body":
                part = message.get("body", b"")
                parts.append(part)
                size += len(part)
                if size > self._options.max_answer:
                    raise AnswerTooLargeError(f"the answer is larger than {self._options.max_answer} bytes")
                complete = complete or not message.get("more_body", False)

        await self._app(scope, receive, send)
        if status is None or not complete:
            raise RuntimeError("the application returned before its answer was complete")
        return Response(status, headers, b"".join(parts))


def _nobody(scope: AsgiScope) -> None:
    return None


def _values(scope: AsgiScope, *names: str) -> list[str]:
    """The values of header fields, one for each time that they were sent."""
    wanted = {name.lower().encode("latin-1") for name in names}
    return [value.decode("latin-1") for name, value in scope["headers"] if name.lower() in wanted]


async def _body(receive: Receive, limit: int) -> bytes | None:
    """The whole body of a request, or None if the client has gone. Raises RequestTooLargeError."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise RequestTooLargeError(f"the request is larger than {limit} bytes")
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Hands out a body that was read already, and then what else comes."""
    given = False

    async def first_the_body() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return first_the_body


async def _send(response: Response, send: Send) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response.headers]
    if response.body and not any(name == "content-length" for name, _ in response.headers):
        headers.append((b"content-length", str(len(response.body)).encode()))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
