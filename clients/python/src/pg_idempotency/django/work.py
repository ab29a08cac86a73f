"""Work outside of views, such as that of a task or a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .._claims import Claim, Settings
from .._flows import drive, enter, leave
from .._statements import Statements
from ..types import Interval, Request, Scope
from .options import default_schema, default_using
from .session import DjangoSession


@contextmanager
def idempotent(
    scope: Scope,
    request: Request = None,
    *,
    using: str | None = None,
    commit: bool = True,
    ttl: Interval | None = None,
    wait: Interval | None = None,
    schema: str | None = None,
) -> Iterator[Claim]:
    """
    Do the work of a request once, in one transaction with its answer::

        with idempotent(Scope(tenant="acme", action="orders.ship", key=message_id), message) as claim:
            if not claim.replayed:
                Order.objects.filter(pk=7).update(shipped=True)
                claim.finish(204)

    As ``pg_idempotency.idempotent``, in ``transaction.atomic`` of Django, which is opened and committed here.

    commit: False inside of an ``atomic`` block of the caller, who commits.
    using: the alias of the database; by default that of the setting IDEMPOTENCY.
    schema: the schema of the extension; likewise.

    Raises as ``pg_idempotency.idempotent`` does.
    """
    session = DjangoSession(using or default_using())
    settings = Settings(Statements(schema or default_schema()), ttl, wait, commit)
    claim = Claim(scope)
    drive(enter(claim, request, session, settings))
    try:
        yield claim
    except BaseException as error:
        if not drive(leave(claim, request, session, settings, error)):
            raise
    else:
        drive(leave(claim, request, session, settings, None))
    session.raise_error_of_hook()
