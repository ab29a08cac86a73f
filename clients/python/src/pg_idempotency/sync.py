"""The calls for connections of psycopg and psycopg2, and for sessions of SQLAlchemy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar, Union, cast

from . import _flows, _leases
from ._attempts import Attempts
from ._claims import Claim, Settings, status_of
from ._connections import Session, opens, session_of
from ._flows import Flow, drive
from ._statements import Statements
from .errors import reached
from .types import Answer, Interval, Request, Scope, Status

T = TypeVar("T")

#: A connection, or what opens one: called without arguments, it returns a context manager, as ``pool.connection``
#: of psycopg_pool does and a ``sessionmaker`` of SQLAlchemy.
Connect = Union[Any, Callable[[], AbstractContextManager[Any]]]


@contextmanager
def _connection_of(connect: Connect) -> Iterator[Any]:
    if opens(connect):
        with connect() as connection:
            yield connection
    else:
        yield connect


class idempotent(AbstractContextManager[Claim]):
    """
    Do the work of a request once, in one transaction with its answer::

        with idempotent(connection, scope, request.body) as claim:
            if not claim.replayed:
                connection.execute("INSERT ...")
                claim.finish(201, {"id": 7})
        return claim.answer

    The transaction is opened here, and committed when the block ends: after it, the answer may leave.
    What the block raises rolls back and is passed on, but for a ``Refusal``, whose answer is kept, and the
    rows of its work are not. So it is with an answer of 400 and more.

    connection: a connection of psycopg or psycopg2 in which no transaction is open, or a ``Session`` of SQLAlchemy.
    scope: what the request is known by.
    request: what tells it from a different request; best the text of its body as it came.
    commit: False if the caller has opened a transaction and commits it. Nothing may then stand between the
        end of the block and COMMIT, and the answer may leave after that has succeeded.
    ttl: how long the answer is kept; by default what the settings of the server say.
    wait: how long a repeat waits for the first request; by default not at all.
    schema: the schema of the extension.

    Raises InFlightError, MismatchError, KeyMissingError, KeyInvalidError, RequestInvalidError at its beginning: answer
    with their ``status``. OutOfOrderError if a transaction is open, or with ``commit=False`` is not. Raises at its
    end UnfinishedError if ``claim.finish`` was not called, RolledBackError if an error was swallowed, and errors of
    the driver such as a serialization failure. UnavailableError if the connection was lost, and CommitUnknownError if
    that was during COMMIT.
    """

    def __init__(
        self,
        connection: Any,
        scope: Scope,
        request: Request = None,
        *,
        commit: bool = True,
        ttl: Interval | None = None,
        wait: Interval | None = None,
        schema: str = "idempotency",
    ) -> None:
        self._session = session_of(connection)
        self._request = request
        self._settings = Settings(Statements(schema), ttl, wait, commit)
        self._claim = Claim(scope)

    def __enter__(self) -> Claim:
        drive(_flows.enter(self._claim, self._request, self._session, self._settings))
        return self._claim

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        return drive(_flows.leave(self._claim, self._request, self._session, self._settings, error))


def run(
    connect: Connect,
    scope: Scope,
    request: Request,
    work: Callable[[Any], Answer],
    *,
    ttl: Interval | None = None,
    wait: Interval | None = None,
    retries: int = 3,
    schema: str = "idempotency",
) -> Answer:
    """
    Do the work of a request once, and do it again after a conflict of transactions.

    After a serialization failure or a deadlock (40001, 40P01) the work is called again. If the connection is
    lost during COMMIT, and ``connect`` opens another one, it is asked once more with the same key: there is the
    answer, or the work was rolled back and is called again.

    connect: a connection, or what opens one, such as ``pool.connection``.
    work: gets the connection, and returns the answer or raises a ``Refusal``; without effects outside of the
        database, as it may be called again.
    retries: how many times the work may be called again after a conflict.

    The other arguments are those of ``idempotent``. Returns the answer, once it is committed. Raises as
    ``idempotent`` does, and ConflictError if the last try was in conflict as well.
    """
    attempts = Attempts(retries, opens(connect), wait)
    while True:
        claim: Claim | None = None
        try:
            with _connection_of(connect) as connection:
                with idempotent(connection, scope, request, ttl=ttl, wait=attempts.wait, schema=schema) as claim:
                    if not claim.replayed:
                        claim.finish_with(work(connection))
            return cast(Answer, claim.answer)
        except Exception as error:
            delay = attempts.again_after(error, claim)
        time.sleep(delay)


class LeasedClaim(_leases.LeasedClaim):
    """
    The right to do work with effects outside the database, for as long as the lease lasts.

    id: the claim's id, its fencing token, which never comes again.
    attempt: how many times the work was begun, this time included.
    recovery: where an earlier attempt got, or the last checkpoint of this one; None at the beginning.

    The others are those of ``Claim``.
    """

    _lease: _leases.Lease

    def checkpoint(self, point: str, state: Any = None, *, lease: Interval | None = None) -> None:
        """
        Save how far the work got, before and after each effect outside, and renew the lease.

        point: the name of the point; "" says that everything was undone.
        state: what is needed to go on from there, as JSON.
        lease: how long the lease is from now on; by default as long as at the beginning.

        Inside of ``transaction`` it is committed with that. Raises ClaimLostError: stop.
        """
        drive(self._lease.checkpoint(point, state, lease))

    def release(self) -> None:
        """Give the lease back without an answer; what was saved stays for the next attempt."""
        drive(self._lease.release())

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """
        A transaction for rows that belong to the claim; the block gets its connection.

        With ``finish`` inside, the answer and the rows are committed together, and with ``checkpoint`` inside,
        how far the work got. One of them has to be, as they are fenced by the claim: if it was taken over,
        ClaimLostError comes out and nothing was written. With an answer of 400 and more, the rows are rolled back.

        What the block raises rolls back, and with it what was said inside. Raises UnfinishedError if nothing was.
        """
        with self._lease.provider.session() as session:
            drive(self._lease.enter_transaction(session))
            try:
                yield session.connection
            except BaseException as error:
                drive(self._lease.abandon_transaction(error))
                raise
            unknown = drive(self._lease.leave_transaction())
        if unknown is not None:
            drive(self._lease.find_out(unknown))


class _Provider:
    """Carries out flows, each on a connection of its own where those can be opened."""

    def __init__(self, connect: Connect) -> None:
        self.renewable = opens(connect)
        self._connect = connect

    @contextmanager
    def session(self) -> Iterator[Session]:
        with ExitStack() as stack:
            try:
                connection = stack.enter_context(_connection_of(self._connect))
            except Exception as error:
                raise reached(error)
            yield session_of(connection)

    def carry_out(self, flow: Callable[[Session], Flow[T]]) -> T:
        with _connection_of(self._connect) as connection:
            return drive(flow(session_of(connection)))

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)


@contextmanager
def lease(
    connect: Connect,
    scope: Scope,
    request: Request = None,
    *,
    lease: Interval = "30 minutes",
    ttl: Interval | None = None,
    schema: str = "idempotency",
) -> Iterator[LeasedClaim]:
    """
    Do work that has effects outside the database, under a lease::

        with lease(pool.connection, scope, request.body, lease="5 minutes") as claim:
            if not claim.replayed:
                if claim.recovery is None:
                    claim.checkpoint("charged", provider.charge(30, key=claim.key))
                with claim.transaction() as connection:
                    connection.execute("INSERT ...")
                    claim.finish(201, {"charge": claim.recovery.state})
        return claim.answer

    Nothing of the lease is bound to a connection: with ``pool.connection`` none is held while the work runs.
    When the process dies, the next request with the scope goes on from the last checkpoint, once the lease has
    run out. When the block raises, the lease is given back, so that a repeat need not wait. ``claim.finish``
    outside of a ``claim.transaction()`` keeps the answer when the block ends.

    connect: a connection in which no transaction is open, or what opens one.
    lease: how long the lease is.

    The other arguments are those of ``idempotent``, and so are the errors; ClaimLostError if the work took
    longer than its lease and somebody else took over.
    """
    claim = LeasedClaim(scope)
    claim._lease = _leases.Lease(claim, request, lease, _Provider(connect), Settings(Statements(schema), ttl))
    drive(claim._lease.begin())
    try:
        yield claim
    except BaseException as error:
        if not drive(claim._lease.leave(error)):
            raise
    else:
        drive(claim._lease.leave(None))


def store(connection: Any, scope: Scope, request: Request, answer: Answer, *, schema: str = "idempotency") -> Answer:
    """
    Keep an answer that is known already, in a transaction of its own.

    connection: one in which no transaction is open.

    Returns the answer, or that of an earlier request: the first answer stays. Raises InFlightError, MismatchError.
    """
    settings = Settings(Statements(schema))
    return drive(_flows.store(scope, request, answer, session_of(connection), settings))


def status(connection: Any, scope: Scope, request: Request = None, *, schema: str = "idempotency") -> Status:
    """
    Look what became of a request, and do nothing else: what a page polls that shows its state.

    request: if it is given, and the key was used with a different one: MismatchError.
    """
    statement = Statements(schema).replay(scope, request)
    return status_of(drive(_flows.look(session_of(connection), statement)))


def first_seen(
    connection: Any,
    consumer: str,
    ids: Iterable[str],
    *,
    tenant: str | None = None,
    ttl: Interval | None = None,
    schema: str = "idempotency",
) -> list[str]:
    """
    Those messages of a queue that this consumer has never seen, in the transaction of the work on them.

    It opens a transaction as any statement does, and does not commit. With a connection in autocommit mode,
    call it inside a transaction: else the ids are remembered whatever becomes of the work.

    consumer: who asks: each consumer sees each message once.
    ids: the ids of messages, of which each comes once in the result, in the order of the batch.
    ttl: for how long an id is remembered.
    """
    statement = Statements(schema).first_seen(tenant, consumer, ids, ttl)
    return drive(_flows.first_seen(session_of(connection), statement))
