"""
How views are protected: what the setting IDEMPOTENCY says, and what a view says instead.

What cannot be meant is an ImproperlyConfigured, and comes when a view is decorated, which is when the
service starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS
from django.utils.module_loading import import_string

from ..http import HttpOptions

#: Takes a request and returns whose it is; None says that there is none.
Who = Callable[[Any], Any]

_NOTHING: Mapping[str, Any] = {}
_OF_HTTP = frozenset(field.name for field in fields(HttpOptions))
_OF_VIEWS = frozenset({"tenant", "actor", "action", "using", "finished_by", "retries"})


@dataclass(frozen=True)
class Options:
    """
    How a view is protected.

    http: the rules for keys, fingerprints and answers.
    tenant, actor: whose data a request is about, and who acts; None for none.
    action: the operation; None for the method and the template of the route.
    using: the alias of the database.
    finished_by: who says what the answer is: ``view`` for what the view returns, ``service`` for what was
        given to ``finish``.
    retries: how many times a view may be called again after a conflict of transactions.
    """

    http: HttpOptions
    tenant: Who | None
    actor: Who | None
    action: str | None
    using: str
    finished_by: str
    retries: int


def setting() -> Mapping[str, Any]:
    """The setting IDEMPOTENCY; empty if there is none."""
    return getattr(settings, "IDEMPOTENCY", None) or _NOTHING


def default_using() -> str:
    """The alias of the database that the setting names."""
    return setting().get("using", DEFAULT_DB_ALIAS)


def default_schema() -> str:
    """The schema of the extension that the setting names."""
    return setting().get("schema", HttpOptions.schema)


def http_options() -> HttpOptions:
    """The rules that the setting makes. Raises ImproperlyConfigured."""
    return _http(setting())


def options_of(overrides: Mapping[str, Any]) -> Options:
    """
    The setting, with what a view says instead.

    Raises ImproperlyConfigured for what is unknown or cannot be meant, and if neither tenant nor actor is
    given: nobody must be answered with what belongs to somebody else.
    """
    given = {**setting(), **overrides}
    if "tenant" not in given and "actor" not in given:
        raise ImproperlyConfigured(
            'IDEMPOTENCY says neither "tenant" nor "actor", so that everybody would share one scope: '
            "give a function of the request, or None for an API without users"
        )
    finished_by = given.get("finished_by", "view")
    if finished_by not in ("view", "service"):
        raise ImproperlyConfigured(f'finished_by is "view" or "service", not {finished_by!r}')
    return Options(
        http=_http(given),
        tenant=_who("tenant", given),
        actor=_who("actor", given),
        action=given.get("action"),
        using=given.get("using", DEFAULT_DB_ALIAS),
        finished_by=finished_by,
        retries=given.get("retries", 3),
    )


def _http(given: Mapping[str, Any]) -> HttpOptions:
    unknown = sorted(set(given) - _OF_HTTP - _OF_VIEWS)
    if unknown:
        raise ImproperlyConfigured(f"there is no option {', '.join(unknown)} of idempotency")
    chosen = {name: value for name, value in given.items() if name in _OF_HTTP}
    if isinstance(chosen.get("problem"), str):
        chosen["problem"] = _imported("problem", chosen["problem"])
    try:
        return HttpOptions(**chosen)
    except ValueError as error:
        raise ImproperlyConfigured(f"IDEMPOTENCY: {error}") from error


def _who(name: str, given: Mapping[str, Any]) -> Who | None:
    value = given.get(name)
    if isinstance(value, str):
        value = _imported(name, value)
    if value is not None and not callable(value):
        raise ImproperlyConfigured(f"{name} is a function of the request, its dotted path or None, not {value!r}")
    return value


def _imported(name: str, path: str) -> Any:
    try:
        return import_string(path)
    except ImportError as error:
        raise ImproperlyConfigured(f"{name}: {error}") from error
