"""What a request is known by, what tells it from another, and what its answer is."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, Union

#: How long something lasts: a ``timedelta``, or as PostgreSQL writes an interval, such as ``"24 hours"``.
Interval = Union[str, timedelta]

#: Header fields of an answer. A field that comes several times has a list of values.
Headers = Mapping[str, Union[str, Sequence[str]]]


@dataclass(frozen=True, kw_only=True)
class Scope:
    """
    What a request is known by. All four are compared byte for byte.

    action: the operation, such as ``"orders.create"`` or ``"POST /orders"``.
    key: the key that the client sent.
    tenant: whose data the request is about, from the log-in; None and "" are the one global tenant.
    actor: a user or client inside the tenant, when two of them may choose the same key.

    Raises TypeError for what is no text, such as a UUID: drivers differ in whether and how they send it.
    """

    action: str
    key: str
    tenant: str | None = None
    actor: str | None = None

    def __post_init__(self) -> None:
        for value in (self.action, self.key, self.tenant, self.actor):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"a scope is made of texts: str({value!r})?")


class RawJson(str):
    """JSON text that is kept as it is, byte for byte."""


@dataclass(frozen=True)
class JsonRequest:
    """
    A request of which some parts do not count, such as the time at which it was sent.

    text: JSON text, as it came.
    omit: paths of the members that do not count, such as ``[("meta", "trace_id")]``.

    Raises TypeError for a path that is a text, whose characters would be taken for names.
    """

    text: str | bytes
    omit: Iterable[Sequence[str]] = ()

    def __post_init__(self) -> None:
        paths = tuple(self.omit)
        if any(isinstance(path, str) for path in paths):
            raise TypeError(f"a path is a sequence of names, such as ('meta', 'trace_id'): {self.omit!r} has a text")
        object.__setattr__(self, "omit", tuple(tuple(path) for path in paths))


@dataclass(frozen=True)
class Digest:
    """A digest of a request that is not JSON: 16 to 64 bytes."""

    value: bytes


#: What tells a repeat from a different request under the same key:
#:
#: - a ``str`` or ``bytes``: the JSON text of the request, as it came;
#: - a ``JsonRequest``: the same, with parts that do not count;
#: - a ``Digest``, for what is not JSON;
#: - None: nothing is compared;
#: - any other value is turned into JSON text.
Request = Union[str, bytes, JsonRequest, Digest, Mapping[str, Any], Sequence[Any], int, float, None]

#: How an answer came about: ``completed`` and ``errored`` are kept; ``released`` is not, so that a
#: repeat runs; ``replayed`` was kept by an earlier request.
Outcome = Literal["completed", "errored", "released", "replayed"]


@dataclass(frozen=True)
class Answer:
    """
    An answer to a request.

    status: HTTP status, from 100 to 599. With 400 and more, what the work wrote is rolled back.
    body: ``bytes`` for what is not JSON, a ``RawJson`` for JSON text that is kept as it is, None for
        nothing; any other value is turned into JSON text.
    headers: header fields that are kept with the answer.
    ttl: how long the answer is kept; by default what the settings of the server say.
    keep_rows: commit what the work wrote although the status is 400 or more.
    outcome: how the answer came about, once that is known.

    Raises ValueError for a status out of range, TypeError for one that is no whole number, and what
    ``json.dumps`` raises.
    """

    status: int = 200
    body: Any = None
    headers: Headers | None = None
    ttl: Interval | None = None
    keep_rows: bool = False
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        # a driver may know an int and not an HTTPStatus
        status = operator.index(self.status)
        if not 100 <= status <= 599:
            raise ValueError(f"the status of an answer is from 100 to 599, not {status}")
        object.__setattr__(self, "status", status)
        body = self.body
        if isinstance(body, (bytearray, memoryview)):
            body = bytes(body)
        elif body is not None and not isinstance(body, (bytes, RawJson)):
            body = RawJson(json_text(body))
        object.__setattr__(self, "body", body)

    @property
    def replayed(self) -> bool:
        """Whether this is the answer of an earlier request."""
        return self.outcome == "replayed"

    @property
    def text(self) -> str | None:
        """The JSON text, byte for byte as it is kept; None if there is none."""
        return str(self.body) if isinstance(self.body, RawJson) else None

    @property
    def content(self) -> bytes:
        """What is sent: the JSON text in UTF-8, or the bytes of what is not JSON; empty if there is nothing."""
        return self.body if isinstance(self.body, bytes) else (self.text or "").encode()

    def json(self) -> Any:
        """The JSON text as a value; None if there is none."""
        return None if self.text is None else json.loads(self.text)


@dataclass(frozen=True)
class Recovery:
    """Where earlier work under a lease got: the name of the point, and what is needed to go on."""

    point: str
    state: Any


@dataclass(frozen=True)
class Status:
    """
    What is known of a request.

    outcome: ``replayed``, ``in_flight``, ``stalled`` (its lease has run out), or None where nothing is known.
    answer: the answer, where the outcome is ``replayed``.
    retry_after: after how many seconds to ask again.
    attempt: how many times the work was begun.
    recovery_point: how far work under a lease got; None at the beginning.
    """

    outcome: Literal["replayed", "in_flight", "stalled"] | None
    answer: Answer | None
    retry_after: int | None
    attempt: int | None
    recovery_point: str | None
    created_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None


def json_text(value: Any) -> str:
    """A value as JSON text, in which NaN and infinity have no place."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
