"""
What happens to a request, step by step, whoever carries it out.

A flow is a generator that yields what a session's call returns. For an ordinary session that is the
result already, and ``drive`` gives it back; for an asynchronous one it is something to be awaited, and
``aio`` gives back what it becomes. So there is one text of the rules for both.

What happens to a request in a transaction, and what it means when something breaks:

    BEGIN, begin    nothing was done yet
    the work        what it raises rolls back and is passed on, except for a Refusal, whose answer is kept
    finish, COMMIT  sent when the work is over, so that nothing can come between them. If the connection
                    is lost, nobody knows whether they took effect. Asking again with the same key tells:
                    there is an answer, or the request is still in flight, or the work never happened.
                    Two of them cannot both commit, whatever this client believes

An answer of 400 and more is kept while the rows of its work are rolled back: the transaction is rolled
back, and the answer stored in a new one, so that the way of success needs no savepoint. Where the caller
commits, the work is inside a savepoint instead.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, TypeVar, cast

from ._claims import Claim, Settings, found_answer
from ._connections import Row, Session
from ._statements import Statement
from .errors import (
    IdempotencyError,
    OutOfOrderError,
    Refusal,
    UnavailableError,
    UnfinishedError,
    is_of_driver,
    sqlstate_of,
    translated,
)
from .types import Answer, Request, Scope

T = TypeVar("T")
Flow = Generator[Any, Any, T]

#: What a call says that needs a transaction and has none: the claim would end with the statement, or a
#: savepoint cannot be set.
_OUTSIDE = ("ID006", "25P01")


def drive(flow: Flow[T]) -> T:
    """Carry out a flow over ordinary sessions."""
    try:
        result = next(flow)
        while True:
            result = flow.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value


def enter(claim: Claim, request: Request, session: Session, settings: Settings) -> Flow[None]:
    """Begin a request. Raises InFlightError, MismatchError and so on; nothing of ours is open then."""
    statement = settings.statements.begin(claim.scope, request, settings.wait)
    if settings.commit:
        must_be_idle(session)
    try:
        if settings.commit:
            yield session.begin()
        (row,) = yield session.fetch(statement)
        if row["outcome"] != "started":
            claim.answer = found_answer(row)
            claim.replayed = True
        if not settings.commit:
            yield session.set_savepoint()
        claim._open = not claim.replayed
    except BaseException as error:
        if settings.commit:
            yield from roll_back(session)
        elif sqlstate_of(error) in _OUTSIDE:
            raise OutOfOrderError("with commit=False, a transaction has to be open") from error
        raise meaning(error, session, beginning=True)


def leave(
    claim: Claim, request: Request, session: Session, settings: Settings, error: BaseException | None
) -> Flow[bool]:
    """
    Keep the answer and commit, or undo the work. Returns whether the error was a refusal, for which there is an answer.

    Raises what the database says of finish and COMMIT.
    """
    claim._open = False
    refused = isinstance(error, Refusal)
    if claim.replayed:
        # whatever was written all the same must not be committed a second time
        yield from _undo(session, settings)
        return refused
    if isinstance(error, Refusal):
        answer = settings.kept(error.answer)
    elif error is not None:
        yield from _undo(session, settings)
        if says_lost(error, session):
            raise unavailable(error)
        return False
    elif claim._said is None:
        yield from _undo(session, settings)
        raise UnfinishedError(
            f'the work of "{claim.scope.action}" ended without claim.finish: nothing was kept or committed'
        )
    else:
        answer = settings.kept(claim._said)
    claim._worked = True
    try:
        if undoes(answer) and settings.commit:
            yield session.rollback()
            claim.answer = yield from store(claim.scope, request, answer, session, settings)
        else:
            if undoes(answer):
                yield session.undo()
            (row,) = yield session.fetch(settings.statements.finish(claim.scope, answer))
            if settings.commit:
                yield session.commit()
            else:
                yield session.leave_savepoint()
            claim.answer = replace(answer, outcome=row["outcome"])
    except BaseException as wrong:
        yield from _undo(session, settings)
        raise meaning(wrong, session)
    return refused


def store(scope: Scope, request: Request, answer: Answer, session: Session, settings: Settings) -> Flow[Answer]:
    """Keep an answer in a transaction of its own, unless there is one. Raises InFlightError, MismatchError."""
    row = yield from alone(session, settings.statements.store(scope, request, answer), beginning=True)
    if row["outcome"] in ("completed", "errored", "released"):
        return replace(answer, outcome=row["outcome"])
    return found_answer(row)


def look(session: Session, statement: Statement) -> Flow[Row]:
    """Send a statement that writes nothing. Where no transaction was open, none is afterwards."""
    idle = session.is_idle()
    try:
        (row,) = yield session.fetch(statement)
        return cast(Row, row)
    except BaseException as error:
        raise meaning(error, session, beginning=True)
    finally:
        if idle:
            yield from roll_back(session)


def first_seen(session: Session, statement: Statement) -> Flow[list[str]]:
    """The ids that a statement says were never seen."""
    try:
        rows = yield session.fetch(statement)
    except BaseException as error:
        raise meaning(error, session)
    return [row["id"] for row in rows]


def alone(session: Session, statement: Statement, *, beginning: bool = False) -> Flow[Row]:
    """A statement in a transaction of its own, on a connection where none is open."""
    must_be_idle(session)
    try:
        yield session.begin()
        (row,) = yield session.fetch(statement)
        yield session.commit()
        return cast(Row, row)
    except BaseException as error:
        yield from roll_back(session)
        raise meaning(error, session, beginning=beginning)


def must_be_idle(session: Session) -> None:
    if session.is_idle():
        return
    if session.is_lost():
        raise UnavailableError("the connection is closed")
    raise OutOfOrderError(
        "a transaction is open on this connection, so nothing could be committed here: end it first, "
        "or say commit=False to idempotent and commit after its block"
    )


def undoes(answer: Answer) -> bool:
    """Whether what the work wrote is undone for this answer."""
    return answer.status >= 400 and not answer.keep_rows


def _undo(session: Session, settings: Settings) -> Flow[None]:
    """Undo the work, after something else went wrong, which is to come out and not an error of this."""
    if settings.commit:
        yield from roll_back(session)
    else:
        try:
            yield session.undo()
        except Exception:
            pass


def roll_back(session: Session) -> Flow[None]:
    """Roll back a transaction of ours, in the same way."""
    try:
        yield session.rollback()
    except Exception:
        pass


def meaning(error: BaseException, session: Session, *, beginning: bool = False) -> BaseException:
    """
    What to raise for an error of our own statements: the extension's by class, or that the connection was lost.

    beginning: whether the request was just sent, so that JSON which cannot be read is the client's.
    """
    if says_lost(error, session):
        return unavailable(error)
    return translated(error, beginning=beginning)


def says_lost(error: BaseException, session: Session) -> bool:
    """Whether an error says that the connection was lost, and COMMIT was not sent."""
    return session.is_lost() and is_of_driver(error) and not isinstance(error, IdempotencyError)


def unavailable(error: BaseException) -> UnavailableError:
    lost = UnavailableError("the connection was lost, and nothing was done", sqlstate=sqlstate_of(error))
    lost.__cause__ = error
    return lost
