"""The middleware that takes the key from the request, and answers what goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from django.core.signals import got_request_exception
from django.http import HttpResponse

from ..errors import IdempotencyError
from ..http import SAFE_METHODS, HttpOptions
from . import messages
from .options import http_options
from .views import opt_out, protection_of

logger = logging.getLogger("django.request")


class IdempotencyMiddleware:
    """
    Sets ``request.idempotency_key``: the key in the header, or None. A key that is malformed or was sent twice
    is answered with 400, and so is a missing one where the view needs it. A request with a safe method has
    none.

    Answers IdempotencyError, which a view raises, as a problem: ``application/problem+json``.

    It comes before any middleware that reads the stream of a request. Raises ImproperlyConfigured for what
    IDEMPOTENCY cannot mean.
    """

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        http_options()
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        request.idempotency_key = None
        return self.get_response(request)

    def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> HttpResponse | None:
        """Take the key, keep the body, and have Django open no transaction around a view that opens its own."""
        protection = protection_of(view)
        if protection is not None:
            opt_out(view, protection)
        if request.method in SAFE_METHODS:
            return None
        options = replace(http_options(), required=False) if protection is None else protection.options.http
        try:
            request.idempotency_key = messages.key_of(request, options)
            if protection is not None and request.idempotency_key is not None:
                messages.keep_body(request)
        except IdempotencyError as error:
            return self._answer(request, error, options)
        return None

    def process_exception(self, request: Any, error: Exception) -> HttpResponse | None:
        """Answer an error of this package; anything else is not for us."""
        if not isinstance(error, IdempotencyError):
            return None
        return self._answer(request, error, getattr(request, "_idempotency_options", None) or http_options())

    def _answer(self, request: Any, error: IdempotencyError, options: HttpOptions) -> HttpResponse:
        response = messages.response_of(options.problem_of(error))
        if error.status == 500:
            self._report(request, response, error)
        return response

    def _report(self, request: Any, response: HttpResponse, error: IdempotencyError) -> None:
        """Tell of a mistake in the service as Django tells of an exception: to its log, and to whoever listens."""
        got_request_exception.send(sender=type(self), request=request)
        logger.error("%s: %s", request.path, error, exc_info=error, extra={"status_code": 500, "request": request})
        response._has_been_logged = True
