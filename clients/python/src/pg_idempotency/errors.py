"""
What can go wrong, by class, and the HTTP status that each means.

The extension tells its conditions apart by SQLSTATE, in the class ID. Drivers and frameworks hide that in
different places, and ``sqlstate_of`` finds it. Errors that are not the extension's are passed on as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .types import Answer, Headers, Interval


class IdempotencyError(Exception):
    """
    What all errors of this package have in common.

    status: the HTTP status to answer with.
    code: a name for clients of an API, such as ``DUPLICATE_IN_PROGRESS``.
    title: what a client may be told; the message of a database's error is not for it.
    sqlstate, detail, hint: those of the database's error, or None.
    retry_after: after how many seconds a repeat makes sense, or None.
    """

    status = 500
    code = "IDEMPOTENCY_FAILED"
    title = "The request could not be protected"

    def __init__(
        self,
        message: str,
        *,
        sqlstate: str | None = None,
        detail: str | None = None,
        hint: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.detail = detail
        self.hint = hint
        self.retry_after = retry_after


class KeyMissingError(IdempotencyError):
    """The request has no key (ID001)."""

    status = 400
    code = "IDEMPOTENCY_KEY_MISSING"
    title = "The idempotency key is missing"


class KeyInvalidError(IdempotencyError):
    """The key does not have the form that it must have (ID002)."""

    status = 400
    code = "IDEMPOTENCY_KEY_INVALID"
    title = "The idempotency key is malformed"


class RequestInvalidError(IdempotencyError):
    """The request is not JSON that the database can read, such as one with a NUL character (22P02, 22P05)."""

    status = 400
    code = "REQUEST_INVALID"
    title = "The request cannot be read"


class InFlightError(IdempotencyError):
    """The first request with this key is still at work (ID003)."""

    status = 409
    code = "DUPLICATE_IN_PROGRESS"
    title = "A request with this idempotency key is in progress"


class MismatchError(IdempotencyError):
    """The key was used with a different request (ID004)."""

    status = 422
    code = "IDEMPOTENCY_KEY_REUSED"
    title = "The idempotency key was used with a different request"


class ClaimLostError(IdempotencyError):
    """The claim was taken over, or ended by somebody else (ID005): stop, this work does not count."""

    status = 409
    code = "IDEMPOTENCY_CLAIM_LOST"
    title = "Another attempt at this request has taken over"


class UnfinishedError(IdempotencyError):
    """The transaction was to be committed with a claim that was not finished (ID006)."""

    code = "IDEMPOTENCY_UNFINISHED"


class AnswerTooLargeError(IdempotencyError):
    """The answer is larger than ``idempotency.max_response_size`` (ID007)."""

    code = "ANSWER_TOO_LARGE"
    title = "The answer is too large to be kept"


class OutOfOrderError(IdempotencyError):
    """A call out of order (ID008), or one that cannot be right where it is."""

    code = "IDEMPOTENCY_OUT_OF_ORDER"


class RolledBackError(IdempotencyError):
    """COMMIT was answered with ROLLBACK: an error inside the transaction had been swallowed."""

    code = "TRANSACTION_ROLLED_BACK"


class CommitUnknownError(IdempotencyError):
    """The connection broke during COMMIT, and it is not known what became of it: ask with the same key."""

    status = 503
    code = "OUTCOME_UNKNOWN"
    title = "It is not known whether the request was done; repeat it with the same idempotency key"


class ConflictError(IdempotencyError):
    """A conflict between transactions (40001, 40P01) that remained after some tries."""

    status = 503
    code = "TRANSACTION_CONFLICT"
    title = "The request was in conflict with others; repeat it with the same idempotency key"


class UnavailableError(IdempotencyError):
    """The database cannot be reached; nothing was done."""

    status = 503
    code = "DATABASE_UNAVAILABLE"
    title = "The request could not be done now; repeat it with the same idempotency key"


class Refusal(Exception):
    """
    To be raised by the work, from however deep inside: its answer is kept, and what it wrote is rolled back.

    status: 400 or more; the other arguments are those of ``Answer``.
    """

    def __init__(
        self, status: int, body: Any = None, headers: Headers | None = None, ttl: Interval | None = None
    ) -> None:
        if status < 400:
            raise ValueError(f"a refusal has a status of 400 or more, not {status}")
        super().__init__(f"refused with {status}")
        self.answer = Answer(status, body, headers, ttl)


BY_SQLSTATE: dict[str, type[IdempotencyError]] = {
    "ID001": KeyMissingError,
    "ID002": KeyInvalidError,
    "ID003": InFlightError,
    "ID004": MismatchError,
    "ID005": ClaimLostError,
    "ID006": UnfinishedError,
    "ID007": AnswerTooLargeError,
    "ID008": OutOfOrderError,
}

#: What the database says of JSON that it cannot read: no JSON, a NUL character, a number out of range,
#: nested too deeply, not UTF-8.
UNREADABLE = frozenset({"22P02", "22P05", "22003", "54001", "22021"})


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those below it: SQLAlchemy has the driver's in ``orig``, Django in ``__cause__``."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "orig", None) or error.__cause__


def _database_error(error: BaseException) -> tuple[BaseException, str] | None:
    """The driver's error inside of an error, and its SQLSTATE: ``sqlstate`` of psycopg, ``pgcode`` of psycopg2."""
    for below in _causes(error):
        state = getattr(below, "sqlstate", None) or getattr(below, "pgcode", None)
        if isinstance(state, str):
            return below, state
    return None


def sqlstate_of(error: BaseException) -> str | None:
    """The SQLSTATE of an error, wherever the driver or framework has put it; None if there is none."""
    found = _database_error(error)
    return found and found[1]


def translated(error: BaseException, *, beginning: bool = False) -> BaseException:
    """
    The error as one of the classes above where it is the extension's, else as it is.

    beginning: whether the request was just sent, so that JSON which cannot be read is the client's.
    """
    found = None if isinstance(error, IdempotencyError) else _database_error(error)
    if found is None:
        return error
    below, state = found
    kind = RequestInvalidError if beginning and state in UNREADABLE else BY_SQLSTATE.get(state)
    if kind is None:
        return error
    diag = getattr(below, "diag", None)
    hint = getattr(diag, "message_hint", None)
    retry_after = None
    if state == "ID003":
        seconds = re.search(r"(\d+) s", hint or "")
        retry_after = int(seconds[1]) if seconds else 1
    new = kind(
        getattr(diag, "message_primary", None) or str(below),
        sqlstate=state,
        detail=getattr(diag, "message_detail", None),
        hint=hint,
        retry_after=retry_after,
    )
    new.__cause__ = error
    return new


def is_conflict(error: BaseException) -> bool:
    """Whether the transaction can be run again: a serialization failure or a deadlock."""
    return not isinstance(error, IdempotencyError) and sqlstate_of(error) in ("40001", "40P01")


def is_of_driver(error: BaseException) -> bool:
    """Whether a driver has raised an error, or what was raised because of it."""
    return any(_has_name(below, "DatabaseError", "InterfaceError") for below in _causes(error))


def reached(error: Exception) -> Exception:
    """An error that came before anything was done: UnavailableError if the database is out of reach, or as it is."""
    if not _has_name(error, "OperationalError"):
        return error
    new = UnavailableError("the database cannot be reached", sqlstate=sqlstate_of(error))
    new.__cause__ = error
    return new


def _has_name(error: BaseException, *names: str) -> bool:
    """Whether an error is of a class of this name: DB-API 2.0 has the same names for all drivers."""
    return any(kind.__name__ in names for kind in type(error).__mro__)
