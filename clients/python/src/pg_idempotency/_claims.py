"""A claim, what is said of it, and what the rows of the extension say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ._connections import Row
from ._statements import Statements
from .errors import InFlightError, MismatchError, OutOfOrderError
from .types import Answer, Headers, Interval, RawJson, Recovery, Scope, Status


@dataclass(frozen=True)
class Settings:
    """What the calls for one request share."""

    statements: Statements
    ttl: Interval | None = None
    wait: Interval | None = None
    #: whether the transaction is opened and committed here, or by the caller
    commit: bool = True

    def kept(self, answer: Answer) -> Answer:
        """An answer with its lifetime."""
        return answer if answer.ttl is not None else replace(answer, ttl=self.ttl)


class Claim:
    """
    The right to do the work of a request, or the answer that it has already.

    scope: what the request is known by.
    replayed: whether there is an answer already, so that the work must not be done.
    answer: that answer; else None until the block has ended, and then the new one.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.replayed = False
        self.answer: Answer | None = None
        self._said: Answer | None = None
        #: whether it can be finished
        self._open = False
        #: whether the work has come to an answer
        self._worked = False

    @property
    def key(self) -> str:
        """The key that the client sent."""
        return self.scope.key

    @property
    def finished(self) -> bool:
        """Whether ``finish`` was called."""
        return self._said is not None

    def finish(
        self,
        status: int = 200,
        body: Any = None,
        headers: Headers | None = None,
        ttl: Interval | None = None,
        *,
        keep_rows: bool = False,
    ) -> None:
        """
        Say what the answer is. It is sent when the block ends, as the last statement before COMMIT.

        The arguments are those of ``Answer``. Raises OutOfOrderError where there is no work to answer.
        """
        self.finish_with(Answer(status, body, headers, ttl, keep_rows))

    def finish_with(self, answer: Answer) -> None:
        """The same, with an answer that is made already. Raises TypeError for anything else."""
        if not isinstance(answer, Answer):
            raise TypeError(f"an Answer is needed, not {answer!r}")
        if self.replayed:
            raise OutOfOrderError("finish was called for a request that has its answer: look at claim.replayed")
        if not self._open:
            raise OutOfOrderError("finish was called when the claim was over")
        if self._said is not None:
            raise OutOfOrderError("finish was called twice")
        self._said = answer


def answer_of(row: Row) -> Answer:
    """The answer in a row."""
    if row["response"] is not None:
        body: Any = RawJson(row["response"])
    else:
        body = None if row["body"] is None else bytes(row["body"])
    headers = None if row["headers"] is None else Answer(body=RawJson(row["headers"])).json()
    return Answer(row["status_code"], body, headers, outcome=row["outcome"])


def found_answer(row: Row) -> Answer:
    """The answer in a row of begin or store. Raises InFlightError or MismatchError if there is none."""
    if row["outcome"] == "mismatched":
        raise MismatchError("key was used with a different request", sqlstate="ID004")
    if row["outcome"] == "in_flight":
        seconds = row["retry_after"] or 1
        raise InFlightError("request with this key is in flight", sqlstate="ID003", retry_after=seconds)
    return answer_of(row)


def recovery_of(row: Row) -> Recovery | None:
    """How far earlier work got."""
    if row["recovery_point"] is None:
        return None
    state = row["recovery_state"]
    return Recovery(row["recovery_point"], None if state is None else Answer(body=RawJson(state)).json())


def status_of(row: Row) -> Status:
    """What a row of replay says."""
    return Status(
        outcome=row["outcome"],
        answer=answer_of(row) if row["outcome"] == "replayed" else None,
        retry_after=row["retry_after"],
        attempt=row["attempt"],
        recovery_point=row["recovery_point"],
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        expires_at=row["expires_at"],
    )
