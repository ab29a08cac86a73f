"""
Fixtures for tests of Django: the project on a database of its own, requests, and a real server.

Tests bring their views along: ``serve`` puts them where the URLs are. The URLs are the process's, so that the
server, which runs in threads, has them as well.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import django
import pytest

sys.path.append(os.path.dirname(__file__))
os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
django.setup()

from django.core.management import call_command  # noqa: E402
from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler  # noqa: E402
from django.core.wsgi import get_wsgi_application  # noqa: E402
from django.db import connection, connections  # noqa: E402
from django.test import Client, override_settings  # noqa: E402
from django.urls import path  # noqa: E402
from pg_idempotency.django import idempotent_view  # noqa: E402

MARKER = "Idempotent-Replayed"


def tenant_of(request: Any) -> str:
    """Whose a request is, as the tests say it."""
    return request.headers.get("X-Tenant", "acme")


#: The decorator, without users.
protect = functools.partial(idempotent_view, tenant=tenant_of, actor=None)


@pytest.fixture(scope="module")
def project(database: Any) -> Iterator[Any]:
    """The project with its tables, on the database of this file of tests."""
    place = urlsplit(database.url)
    connection.settings_dict.update(NAME=place.path.lstrip("/"), HOST=place.hostname, PORT=str(place.port))
    connection.close()
    call_command("migrate", verbosity=0)
    yield database
    connections.close_all()


@contextmanager
def alias_of(database: Any, alias: str) -> Iterator[None]:
    """Another database, under an alias of its own."""
    place = urlsplit(database.url)
    connections.databases[alias] = {
        **connection.settings_dict,
        "NAME": place.path.lstrip("/"),
        "ATOMIC_REQUESTS": False,
    }
    try:
        yield
    finally:
        connections[alias].close()
        del connections[alias], connections.databases[alias]


@pytest.fixture(params=[False, True], ids=["", "atomic-requests"])
def atomic_requests(request: pytest.FixtureRequest) -> Iterator[bool]:
    """ATOMIC_REQUESTS off and on."""
    connection.settings_dict["ATOMIC_REQUESTS"] = request.param
    yield request.param
    connection.settings_dict["ATOMIC_REQUESTS"] = False


@pytest.fixture
def serve() -> Iterator[Callable[..., None]]:
    """Puts views at ``/``, or patterns of URLs where they say."""
    overrides = []

    def put(*views: Any, **settings: Any) -> None:
        urls = tuple(path("", view) if callable(view) else view for view in views)
        override = override_settings(ROOT_URLCONF=urls, **settings)
        override.enable()
        overrides.append(override)

    yield put
    for override in reversed(overrides):
        override.disable()


@pytest.fixture
def key() -> str:
    """A key that no other test has."""
    return str(uuid4())


def send(
    key: str | None = None,
    body: Any = None,
    url: str = "/",
    method: str = "post",
    client: Any = None,
    content_type: str = "application/json",
    **headers: str,
) -> Any:
    """Send a request, and return the response. What a view raises comes out, unless the client says otherwise."""
    if not isinstance(body, (str, bytes)):
        body = json.dumps({} if body is None else body)
    extra = {f"HTTP_{name.upper()}": value for name, value in headers.items()}
    if key is not None:
        extra["HTTP_IDEMPOTENCY_KEY"] = key
    return getattr(client or Client(), method)(url, body, content_type=content_type, **extra)


def quiet() -> Client:
    """A client that gets the answer to an error instead of the error."""
    return Client(raise_request_exception=False)


class _Handler(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(project: Any) -> Iterator[tuple[str, int]]:
    """Django's own server, with a thread for each connection: its host and port."""
    http = ThreadedWSGIServer(("127.0.0.1", 0), _Handler)
    http.set_app(get_wsgi_application())
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield http.server_address
    http.shutdown()
    http.server_close()
    thread.join()
