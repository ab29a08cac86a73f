"""What ``manage.py check`` says of the setting and the middleware."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils.module_loading import import_string

from .middleware import IdempotencyMiddleware
from .options import default_using, options_of, setting


def check_idempotency(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """All that is wrong with how the service is set up."""
    return [*_of_setting(), *_of_database(), *_of_middleware()]


def _of_setting() -> Iterator[CheckMessage]:
    given = setting()
    nobody = "tenant" not in given and "actor" not in given
    if nobody:
        yield Warning(
            "IDEMPOTENCY says neither whose data a request is about nor who acts.",
            hint='Give "tenant" or "actor", a function of the request; None for an API without users. '
            "Otherwise each protected view has to.",
            id="pg_idempotency.W001",
        )
    try:
        options_of({"tenant": None} if nobody else {})
    except ImproperlyConfigured as error:
        yield Error(str(error), id="pg_idempotency.E001")


def _of_database() -> Iterator[CheckMessage]:
    using = default_using()
    if using not in connections:
        yield Error(f'IDEMPOTENCY names the database "{using}", which DATABASES has not.', id="pg_idempotency.E002")
    elif connections[using].vendor != "postgresql":
        yield Error(f'The database "{using}" is not PostgreSQL.', id="pg_idempotency.E003")
    elif not connections[using].settings_dict["AUTOCOMMIT"]:
        yield Error(f'The database "{using}" has AUTOCOMMIT off, so nothing commits.', id="pg_idempotency.E004")


def _of_middleware() -> Iterator[CheckMessage]:
    if not any(_is_ours(path) for path in settings.MIDDLEWARE):
        yield Error(
            "IdempotencyMiddleware is not in MIDDLEWARE.",
            hint='Add "pg_idempotency.django.middleware.IdempotencyMiddleware".',
            id="pg_idempotency.E005",
        )


def _is_ours(path: str) -> bool:
    middleware = import_string(path)
    return inspect.isclass(middleware) and issubclass(middleware, IdempotencyMiddleware)
