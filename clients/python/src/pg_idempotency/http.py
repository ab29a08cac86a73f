"""
Protecting requests of HTTP: what the adapters for Django and ASGI have in common.

An adapter finds the key in the headers, makes a fingerprint of the request, has it handled inside a
transaction and collects the answer, keeps that, commits, and only then sends it. A problem is answered
as ``application/problem+json`` (RFC 9457), as the draft of the IETF on the header asks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from .errors import IdempotencyError, KeyInvalidError, KeyMissingError, RequestInvalidError
from .types import Answer, Digest, Interval, JsonRequest, RawJson, Request, json_text

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

#: The forms of a key: visible characters of ASCII; letters, digits, ``-`` and ``_``; a UUID.
KEY_FORMATS = {
    "ascii": re.compile(r"[\x21-\x7e]+"),
    "slug": re.compile(r"[A-Za-z0-9_-]+"),
    "uuid": re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE),
}

#: Kept with every answer. What the content is encoded in has to be, for the body is kept encoded.
_ALWAYS_KEPT = ("content-type", "location", "etag", "link", "content-encoding")

#: Belongs to one connection at one time, and is never kept.
_NEVER_KEPT = re.compile(
    r"set-cookie2?|date|age|authorization|www-authenticate|proxy-authenticate|authentication-info|connection"
    r"|keep-alive|transfer-encoding|content-length|.*rate-?limit.*|retry-after|.*request-id|.*correlation-id"
    r"|traceparent|tracestate|access-control-.*"
)

#: Not worth to be kept, for it is what a replay of JSON has by default.
_JSON_TYPE = "application/json"

#: Problems that a client can do something about; the messages of others are not for it.
_FOR_CLIENTS = frozenset({"IDEMPOTENCY_KEY_MISSING", "IDEMPOTENCY_KEY_INVALID", "REQUEST_INVALID", "REQUEST_TOO_LARGE"})


@dataclass(frozen=True)
class Problem:
    """
    What a client is told when there is no answer.

    code: such as ``DUPLICATE_IN_PROGRESS``.
    title: the same for all problems of this code.
    detail: about this request.
    retry_after: after how many seconds to repeat the request, where that makes sense.
    """

    status: int
    code: str
    title: str
    detail: str
    retry_after: int | None


#: Makes the content type and the body, as a value for JSON, of a problem.
ProblemFormat = Callable[[Problem], "tuple[str, Any]"]


def problem_json(problem: Problem) -> tuple[str, Any]:
    """RFC 9457, with the code as a member of its own."""
    return "application/problem+json", {
        "type": "about:blank",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
    }


@dataclass(frozen=True)
class Response:
    """A complete answer of HTTP. The names of header fields are in lower case."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """
    How requests are protected.

    header: the name of the header that has the key, or several.
    key_format: ``ascii``, ``slug``, ``uuid``, or a pattern of your own that the whole key must match.
    key_min_length, key_max_length: in characters.
    required: whether a request without a key is refused; else it is not protected.
    omit: paths of what does not count in the fingerprint, beginning with ``params``, ``query`` or ``body``,
        such as ``"body.sent_at"``, or as a sequence of names where a name has a dot.
    replay_headers: names of further header fields that are kept with an answer, besides Content-Type,
        Content-Encoding, Location, ETag and Link.
    marker: the name of the header that marks a replay; None for no mark.
    ttl: how long answers are kept by status, such as ``{404: "10 s", "2xx": "24 h"}``.
    wait: how long a repeat waits for the first request; by default not at all.
    mismatch_status: 422 or 409, for a key that was used with a different request.
    max_retry_after: the most that Retry-After says, in seconds.
    max_answer: the largest answer that is kept, in bytes.
    problem: makes the body of a problem.
    schema: the schema of the extension.

    Raises ValueError for what cannot be meant.
    """

    header: str | Sequence[str] = "Idempotency-Key"
    key_format: str | re.Pattern[str] = "ascii"
    key_min_length: int = 1
    key_max_length: int = 255
    required: bool = True
    omit: Iterable[str | Sequence[str]] = ()
    replay_headers: Iterable[str] = ()
    marker: str | None = "Idempotent-Replayed"
    ttl: Mapping[int | str, Interval] = field(default_factory=dict)
    wait: Interval | None = None
    mismatch_status: int = 422
    max_retry_after: int = 10
    max_answer: int = 1024 * 1024
    problem: ProblemFormat = problem_json
    schema: str = "idempotency"

    def __post_init__(self) -> None:
        names = (self.header,) if isinstance(self.header, str) else tuple(self.header)
        if not names:
            raise ValueError("there must be a header for the key")
        if isinstance(self.key_format, str) and self.key_format not in KEY_FORMATS:
            raise ValueError(f"the form of a key is one of {', '.join(KEY_FORMATS)}, not {self.key_format!r}")
        if self.mismatch_status not in (409, 422):
            raise ValueError("mismatch_status is 422 or 409")
        for status in self.ttl:
            if not _is_status(status):
                raise ValueError(f"a lifetime is for a status such as 404, or for many as '4xx', not for {status!r}")
        object.__setattr__(self, "header", names)
        object.__setattr__(self, "omit", tuple(_path(path) for path in self.omit))
        object.__setattr__(self, "replay_headers", _kept_names(self.replay_headers))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the headers that may have the key."""
        return tuple(self.header)

    def key_of(self, values: Iterable[str], *, joined: bool = False) -> str | None:
        """
        The key that a client sent, or None if it may be missing and is.

        A header that is empty is missing. One that was sent twice is refused. The draft of the IETF writes the
        key in quotes, most APIs do not: they are taken off, so that both are one key.

        values: the values of the headers, one for each time that they were sent.
        joined: whether several would have been joined by commas, as WSGI servers do; a key has no comma then.

        Raises KeyMissingError, KeyInvalidError.
        """
        keys = [key for key in map(_unquoted, values) if key]
        if not keys:
            if self.required:
                raise KeyMissingError(f"the header {self.names[0]} is missing")
            return None
        if len(keys) > 1:
            raise KeyInvalidError("the header was sent more than once")
        (key,) = keys
        if joined and "," in key:
            raise KeyInvalidError("the header was sent more than once, or has a comma")
        if not self.key_min_length <= len(key) <= self.key_max_length:
            raise KeyInvalidError(f"the key must have {self.key_min_length} to {self.key_max_length} characters")
        if isinstance(self.key_format, str):
            if not KEY_FORMATS[self.key_format].fullmatch(key):
                raise KeyInvalidError(f'the key must have the form "{self.key_format}"')
        elif not self.key_format.fullmatch(key):
            raise KeyInvalidError("the key does not have the form that it must have")
        return key

    def fingerprint_of(
        self,
        params: Mapping[str, Any],
        query: Iterable[tuple[str, str]],
        content_type: str,
        body: bytes,
        *,
        encoded: bool = False,
    ) -> Request:
        """
        What tells a repeat from a different request: parameters of path and query, and the body as it came.

        The text of the body and not what a parser made of it, since parsers round. The database compares JSON
        as ``jsonb``, so that the order of members and white space do not count. The text is put into a larger
        one, so it has to be JSON by itself first: ``1, "params": {}`` is none.

        params: those of the path, by name.
        query: those of the query, in their order.
        encoded: whether the body has a Content-Encoding.

        Raises RequestInvalidError if the body should be JSON and is not.
        """
        place: dict[str, Any] = {}
        if params:
            place["params"] = {name: str(value) for name, value in params.items()}
        for name, value in query:
            place.setdefault("query", {}).setdefault(name, []).append(value)
        text = json_text(place)
        if not body:
            return JsonRequest(text, self.omit)
        if is_json(content_type) and not encoded:
            comma = "," if place else ""
            return JsonRequest(f'{text[:-1]}{comma}"body":{_checked_json(body)}}}', self.omit)
        kind = content_type.split(";", 1)[0].strip().lower()
        return Digest(hashlib.sha256(json_text([text, kind]).encode() + body).digest())

    def answer_of(self, response: Response) -> Answer:
        """What is kept of an answer: JSON as its text and everything else as bytes, so that a replay is the same."""
        found: dict[str, list[str]] = {}
        for name, value in response.headers:
            if name in self.replay_headers:
                found.setdefault(name, []).append(value)
        kind = found.get("content-type", [""])[0]
        body: Any = response.body or None
        if body is not None and is_json(kind):
            try:
                body = RawJson(_checked_json(body))
            except RequestInvalidError:
                pass
        if isinstance(body, RawJson) and kind == _JSON_TYPE:
            del found["content-type"]
        headers = {name: values[0] if len(values) == 1 else values for name, values in found.items()}
        return Answer(response.status, body, headers or None, self.ttl_of(response.status))

    def ttl_of(self, status: int) -> Interval | None:
        """How long an answer with a status is kept; None for the settings of the server."""
        return self.ttl.get(status, self.ttl.get(f"{status // 100}xx"))

    def response_of(self, answer: Answer) -> Response:
        """A kept answer, as it is sent; marked if it is a replay."""
        headers: dict[str, Any] = {"content-type": _JSON_TYPE} if answer.text is not None else {}
        headers.update(answer.headers or {})
        pairs = [
            (name, value)
            for name, values in headers.items()
            for value in ([values] if isinstance(values, str) else values)
        ]
        if answer.replayed and self.marker is not None:
            pairs.append((self.marker.lower(), "true"))
        return Response(answer.status, pairs, answer.content)

    def problem_of(self, error: IdempotencyError) -> Response:
        """What to answer to an error of this package."""
        status = self.mismatch_status if error.code == "IDEMPOTENCY_KEY_REUSED" else error.status
        seconds = error.retry_after or (1 if status == 503 else None)
        if seconds is not None:
            seconds = min(seconds, self.max_retry_after)
        detail = str(error) if error.code in _FOR_CLIENTS else error.title
        content_type, body = self.problem(Problem(status, error.code, error.title, detail, seconds))
        headers = [("content-type", content_type)]
        if seconds is not None:
            headers.append(("retry-after", str(seconds)))
        return Response(status, headers, json_text(body).encode())


def is_json(content_type: str) -> bool:
    """Whether a content type is JSON: ``application/json``, ``application/problem+json`` and the like."""
    return re.match(r"[^;]*[/+]json\s*(?:;|$)", content_type, re.IGNORECASE) is not None


def checked_id(what: str, value: Any) -> str | None:
    """
    A tenant or actor that a function of the service has returned; None says that there is none.

    Raises TypeError for what is the same for everybody, such as the text of an object or an empty name.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, UUID)) or value == "":
        raise TypeError(
            f"{what} is {value!r}: who is not logged in must not get here, and None says that there is none"
        )
    return str(value)


def _unquoted(value: str) -> str:
    text = value.strip()
    return text[1:-1].strip() if len(text) >= 2 and text[0] == text[-1] == '"' else text


def _is_status(status: int | str) -> bool:
    """Whether this is a status, or as ``4xx`` many of them."""
    return bool(re.fullmatch("[1-5]xx", status)) if isinstance(status, str) else 100 <= status <= 599


def _path(path: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(path.split(".")) if isinstance(path, str) else tuple(path)
    if not names or names[0] not in ("params", "query", "body"):
        raise ValueError(f"a path that is left out begins with params, query or body: {path!r} does not")
    return names


def _kept_names(added: Iterable[str]) -> frozenset[str]:
    names = [name.lower() for name in added]
    for name in names:
        if _NEVER_KEPT.fullmatch(name):
            raise ValueError(f"the header {name} must not be replayed")
    return frozenset((*_ALWAYS_KEPT, *names))


def _checked_json(body: bytes) -> str:
    try:
        text = body.decode()
        # what is not JSON, such as NaN, is refused, and numbers need not be made
        json.loads(text, parse_constant=_refuse, parse_float=str, parse_int=str)
    except (ValueError, RecursionError) as error:
        raise RequestInvalidError("the body is not JSON") from error
    return text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
