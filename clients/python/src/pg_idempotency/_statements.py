"""
The statements that the client sends, each a call of one function of the extension.

A statement names only the arguments that have a value, so that an application uses few forms of them,
which drivers keep prepared. Every parameter is cast, since drivers differ in the types that they send.
Results are read as text where drivers would make something else of them: a replayed answer is the same
bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from .errors import IdempotencyError, KeyInvalidError, RequestInvalidError
from .types import Answer, Digest, Interval, JsonRequest, RawJson, Request, Scope, json_text

_ANSWER = "outcome, status_code, response::text AS response, headers::text AS headers, body, retry_after"
_LEASE = _ANSWER + ", attempt, recovery_point, recovery_state::text AS recovery_state"
_LOOK = _ANSWER + ", attempt, recovery_point, created_at, finished_at, expires_at"


@dataclass(frozen=True)
class Statement:
    """A statement with ``%s`` for its parameters, as psycopg and psycopg2 take it."""

    text: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class _Argument:
    name: str
    value: Any
    type: str
    #: parts of the request that do not count, as PostgreSQL writes arrays
    omit: tuple[str, ...] = ()
    #: whether it is named without a value as well, since the function has no default
    required: bool = False


def _interval(name: str, value: Interval | None) -> _Argument:
    # psycopg and psycopg2 write a timedelta each in a way of its own
    text = f"{value.total_seconds():.6f} seconds" if isinstance(value, timedelta) else value
    return _Argument(name, text, "text::interval")


def array_text(values: Iterable[str]) -> str:
    """A text array as PostgreSQL writes one."""
    quoted = (value.replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return "{" + ",".join(f'"{value}"' for value in quoted) + "}"


def _checked_text(text: str | bytes, wrong: type[IdempotencyError], what: str) -> str:
    """A text that came from a client. Raises an error of the class ``wrong`` if PostgreSQL has no such text."""
    try:
        checked = text.decode() if isinstance(text, bytes) else text.encode().decode()
    except UnicodeError as error:
        raise wrong(f"{what} is not UTF-8") from error
    if "\0" in checked:
        raise wrong(f"{what} has a NUL character")
    return checked


def _request_text(text: str | bytes) -> str:
    return _checked_text(text, RequestInvalidError, "the request")


def _compared(request: Request) -> list[_Argument]:
    """What is compared: the argument ``request``, or ``request_hash``."""
    if request is None:
        return []
    if isinstance(request, Digest):
        return [_Argument("request_hash", request.value, "bytea")]
    if isinstance(request, JsonRequest):
        omit = tuple(array_text(path) for path in request.omit)
        return [_Argument("request", _request_text(request.text), "text::jsonb", omit)]
    text = request if isinstance(request, (str, bytes)) else json_text(request)
    return [_Argument("request", _request_text(text), "text::jsonb")]


def _answer(answer: Answer) -> list[_Argument]:
    is_json = isinstance(answer.body, RawJson)
    return [
        _Argument("status_code", answer.status, "int"),
        _Argument("response", str(answer.body) if is_json else None, "text::json"),
        _Argument("body", None if is_json else answer.body, "bytea"),
        _Argument("headers", json_text(dict(answer.headers)) if answer.headers else None, "text::jsonb"),
        _interval("ttl", answer.ttl),
    ]


class Statements:
    """The calls, in the schema that the extension was created in."""

    def __init__(self, schema: str) -> None:
        # a % would be taken for the beginning of a parameter
        self._schema = '"' + schema.replace('"', '""').replace("%", "%%") + '"'

    def _call(self, columns: str, function: str, places: Sequence[Any], arguments: Iterable[_Argument]) -> Statement:
        """A call with arguments by their place, which are texts, and others by their name, if they have a value."""
        texts = ["%s::text"] * len(places)
        values = list(places)
        for argument in arguments:
            if argument.value is None and not argument.required:
                continue
            omit = " #- %s::text::text[]" * len(argument.omit)
            texts.append(f"{argument.name} => %s::{argument.type}{omit}")
            values += [argument.value, *argument.omit]
        return Statement(f"SELECT {columns} FROM {self._schema}.{function}({', '.join(texts)})", tuple(values))

    def _scoped(self, columns: str, function: str, scope: Scope, *arguments: _Argument) -> Statement:
        key = _checked_text(scope.key, KeyInvalidError, "the key") if scope.key else scope.key
        places = (scope.tenant, scope.action, key)
        return self._call(columns, function, places, (*arguments, _Argument("actor", scope.actor, "text")))

    def begin(self, scope: Scope, request: Request, wait: Interval | None = None) -> Statement:
        return self._scoped(_ANSWER, "idempotency_try_begin", scope, *_compared(request), _interval("wait", wait))

    def begin_lease(self, scope: Scope, request: Request, lease: Interval, claim: str) -> Statement:
        return self._scoped(
            _LEASE,
            "idempotency_try_begin",
            scope,
            *_compared(request),
            _interval("lease", lease),
            _Argument("claim", claim, "text::uuid"),
        )

    def finish(self, scope: Scope, answer: Answer, claim: str | None = None) -> Statement:
        return self._scoped(
            "idempotency_finish AS outcome",
            "idempotency_finish",
            scope,
            *_answer(answer),
            _Argument("claim", claim, "text::uuid"),
        )

    def store(self, scope: Scope, request: Request, answer: Answer) -> Statement:
        compared = _compared(request)
        if not any(argument.name == "request" for argument in compared):
            compared.append(_Argument("request", None, "text::jsonb", required=True))
        return self._scoped(_ANSWER, "idempotency_store", scope, *compared, *_answer(answer))

    def replay(self, scope: Scope, request: Request) -> Statement:
        return self._scoped(_LOOK, "idempotency_replay", scope, *_compared(request))

    def checkpoint(self, scope: Scope, claim: str, point: str, state: Any, lease: Interval | None) -> Statement:
        return self._scoped(
            "idempotency_checkpoint AS lease_ends_at",
            "idempotency_checkpoint",
            scope,
            _Argument("claim", claim, "text::uuid"),
            _Argument("recovery_point", point, "text"),
            _Argument("recovery_state", None if state is None else json_text(state), "text::jsonb"),
            _interval("lease", lease),
        )

    def release(self, scope: Scope, claim: str) -> Statement:
        return self._scoped(
            "idempotency_release AS released", "idempotency_release", scope, _Argument("claim", claim, "text::uuid")
        )

    def first_seen(self, tenant: str | None, consumer: str, ids: Iterable[str], ttl: Interval | None) -> Statement:
        if isinstance(ids, str):
            raise TypeError("the ids are a list: the characters of a text would be taken for ids")
        return self._call(
            "idempotency_first_seen AS id",
            "idempotency_first_seen",
            (tenant, consumer),
            (_Argument("message_ids", array_text(ids), "text::text[]"), _interval("ttl", ttl)),
        )
