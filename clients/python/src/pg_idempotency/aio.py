"""
The calls for asynchronous connections of psycopg 3: those of the package itself, to be awaited.

``connect`` is a connection, or what opens one: called without arguments, it returns an asynchronous context
manager, as ``pool.connection`` of an ``AsyncConnectionPool`` does, or something to await that returns one, as
``psycopg.AsyncConnection.connect`` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from inspect import isawaitable
from typing import Any, TypeVar, Union, cast

from . import _flows, _leases
from ._attempts import Attempts
from ._claims import Claim, Settings, status_of
from ._connections import Session, async_session_of, opens
from ._flows import Flow
from ._statements import Statements
from .errors import reached
from .types import Answer, Interval, Request, Scope, Status

T = TypeVar("T")

#: A connection, or what opens one.
Connect = Union[Any, Callable[[], Any]]


async def drive(flow: Flow[T]) -> T:
    """Carry out a flow over asynchronous sessions: what it yields is awaited, and goes back."""
    try:
        waiting = next(flow)
        while True:
            try:
                result = await waiting
            except BaseException as error:
                waiting = flow.throw(error)
            else:
                waiting = flow.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value


@asynccontextmanager
async def _connection_of(connect: Connect) -> AsyncIterator[Any]:
    if opens(connect):
        opened = connect()
        async with (await opened if isawaitable(opened) else opened) as connection:
            yield connection
    else:
        yield connect


class idempotent(AbstractAsyncContextManager[Claim]):
    """As ``pg_idempotency.idempotent``, with ``async with``."""

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
        self._session = async_session_of(connection)
        self._request = request
        self._settings = Settings(Statements(schema), ttl, wait, commit)
        self._claim = Claim(scope)

    async def __aenter__(self) -> Claim:
        await drive(_flows.enter(self._claim, self._request, self._session, self._settings))
        return self._claim

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        return await drive(_flows.leave(self._claim, self._request, self._session, self._settings, error))


async def run(
    connect: Connect,
    scope: Scope,
    request: Request,
    work: Callable[[Any], Awaitable[Answer]],
    *,
    ttl: Interval | None = None,
    wait: Interval | None = None,
    retries: int = 3,
    schema: str = "idempotency",
) -> Answer:
    """As ``pg_idempotency.run``."""
    attempts = Attempts(retries, opens(connect), wait)
    while True:
        claim: Claim | None = None
        try:
            async with _connection_of(connect) as connection:
                async with idempotent(connection, scope, request, ttl=ttl, wait=attempts.wait, schema=schema) as claim:
                    if not claim.replayed:
                        claim.finish_with(await work(connection))
            return cast(Answer, claim.answer)
        except Exception as error:
            delay = attempts.again_after(error, claim)
        await asyncio.sleep(delay)


class LeasedClaim(_leases.LeasedClaim):
    """As ``pg_idempotency.LeasedClaim``, whose calls are awaited."""

    _lease: _leases.Lease

    async def checkpoint(self, point: str, state: Any = None, *, lease: Interval | None = None) -> None:
        """Save how far the work got, and renew the lease. Raises ClaimLostError: stop."""
        await drive(self._lease.checkpoint(point, state, lease))

    async def release(self) -> None:
        """Give the lease back without an answer; what was saved stays for the next attempt."""
        await drive(self._lease.release())

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        """A transaction for rows that belong to the claim; the block gets its connection."""
        async with self._lease.provider.session() as session:
            await drive(self._lease.enter_transaction(session))
            try:
                yield session.connection
            except BaseException as error:
                await drive(self._lease.abandon_transaction(error))
                raise
            unknown = await drive(self._lease.leave_transaction())
        if unknown is not None:
            await drive(self._lease.find_out(unknown))


class _Provider:
    """Carries out flows, each on a connection of its own where those can be opened."""

    def __init__(self, connect: Connect) -> None:
        self.renewable = opens(connect)
        self._connect = connect

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        async with AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(_connection_of(self._connect))
            except Exception as error:
                raise reached(error)
            yield async_session_of(connection)

    async def carry_out(self, flow: Callable[[Session], Flow[T]]) -> T:
        async with _connection_of(self._connect) as connection:
            return await drive(flow(async_session_of(connection)))

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@asynccontextmanager
async def lease(
    connect: Connect,
    scope: Scope,
    request: Request = None,
    *,
    lease: Interval = "30 minutes",
    ttl: Interval | None = None,
    schema: str = "idempotency",
) -> AsyncIterator[LeasedClaim]:
    """As ``pg_idempotency.lease``."""
    claim = LeasedClaim(scope)
    claim._lease = _leases.Lease(claim, request, lease, _Provider(connect), Settings(Statements(schema), ttl))
    await drive(claim._lease.begin())
    try:
        yield claim
    except BaseException as error:
        if not await drive(claim._lease.leave(error)):
            raise
    else:
        await drive(claim._lease.leave(None))


async def store(
    connection: Any, scope: Scope, request: Request, answer: Answer, *, schema: str = "idempotency"
) -> Answer:
    """As ``pg_idempotency.store``."""
    settings = Settings(Statements(schema))
    return await drive(_flows.store(scope, request, answer, async_session_of(connection), settings))


async def status(connection: Any, scope: Scope, request: Request = None, *, schema: str = "idempotency") -> Status:
    """As ``pg_idempotency.status``."""
    statement = Statements(schema).replay(scope, request)
    return status_of(await drive(_flows.look(async_session_of(connection), statement)))


async def first_seen(
    connection: Any,
    consumer: str,
    ids: Iterable[str],
    *,
    tenant: str | None = None,
    ttl: Interval | None = None,
    schema: str = "idempotency",
) -> list[str]:
    """As ``pg_idempotency.first_seen``."""
    statement = Statements(schema).first_seen(tenant, consumer, ids, ttl)
    return await drive(_flows.first_seen(async_session_of(connection), statement))
