"""The decorator for functions, and the mixin for classes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from django.db.transaction import non_atomic_requests

from . import drf
from .protection import Protection


def idempotent_view(view: Callable[..., Any] | None = None, **overrides: Any) -> Any:
    """
    A view whose requests are done once, by the key that the client sends::

        @idempotent_view
        def create_order(request):
            ...
            return JsonResponse({"id": order.id}, status=201)

    The view is called inside ``transaction.atomic``, and its response leaves after COMMIT. A repeat gets the
    same response, and the view is not called. Requests with a safe method are not protected.

    overrides: what differs from the setting IDEMPOTENCY: ``action``; ``tenant`` and ``actor``; ``using``;
        ``retries``; any field of ``HttpOptions``; and ``finished_by``, which is ``"view"`` if the answer is
        what the view returns, or ``"service"`` if it is what a service gives to ``request.idempotency.finish``.

    Below ``@api_view`` of REST framework and not above, so that the user is known.

    The view raises IdempotencyError, which IdempotencyMiddleware answers. Raises at once ImproperlyConfigured,
    and TypeError for an asynchronous view.
    """
    if view is None:
        return functools.partial(idempotent_view, **overrides)
    name = _name_of(view)
    _refuse_async(name, view)
    if drf.is_class_of(view):
        raise TypeError(
            f"{name} belongs to REST framework: put @idempotent_view below @api_view, "
            "and give a class the IdempotentViewMixin"
        )
    protection = Protection(name, overrides)
    called = view

    @functools.wraps(view)
    def protected(request: Any, *args: Any, **kwargs: Any) -> Any:
        return protection.call(lambda: called(request, *args, **kwargs), request, args, kwargs)

    return _opted_out(protected, protection)


class IdempotentViewMixin:
    """
    A class-based view, of Django or of REST framework, whose requests are done once::

        class Orders(IdempotentViewMixin, APIView):
            idempotency_options = {"finished_by": "service"}

    Its methods for POST, PUT, PATCH and DELETE are protected as by ``idempotent_view``, each by itself: after
    authentication, permissions and what else comes before them, whatever the order of the classes.
    """

    #: What differs from the setting IDEMPOTENCY, as in ``idempotent_view``.
    idempotency_options: Mapping[str, Any] = {}

    #: The same for all requests; made by ``as_view``.
    idempotency_protection: Protection | None = None

    @classmethod
    def as_view(cls, *args: Any, **kwargs: Any) -> Any:
        """As Django's and REST framework's. Raises ImproperlyConfigured, and TypeError for asynchronous methods."""
        name = _name_of(cls)
        for method in cls.http_method_names:  # type: ignore[attr-defined]
            _refuse_async(f"{name}.{method}", getattr(cls, method, None))
        protection = Protection(name, kwargs.get("idempotency_options", cls.idempotency_options))
        view = super().as_view(*args, idempotency_protection=protection, **kwargs)  # type: ignore[misc]
        return _opted_out(view, protection)

    def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Put the protection around the method that is going to be called."""
        method = request.method.lower()
        handler = getattr(self, method, None)
        if handler is not None and method in self.http_method_names:  # type: ignore[attr-defined]
            setattr(self, method, functools.partial(self._protected, handler))
        return super().dispatch(request, *args, **kwargs)  # type: ignore[misc]

    def _protected(self, handler: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.idempotency_protection is not None
        method = getattr(handler, "__name__", request.method.lower())
        return self.idempotency_protection.call(
            lambda: handler(request, *args, **kwargs), request, args, kwargs, method=method
        )


def protection_of(view: Any) -> Protection | None:
    """The protection of a view that a URL leads to; None if it has none."""
    for function in (view, *drf.functions_of(view)):
        protection = getattr(function, "idempotency_protection", None)
        if protection is not None:
            return protection
    return None


def opt_out(view: Any, protection: Protection) -> Any:
    """Have Django not open a transaction around a view, as it does with ATOMIC_REQUESTS."""
    return non_atomic_requests(protection.options.using)(view)


def _opted_out(view: Any, protection: Protection) -> Any:
    view.idempotency_protection = protection
    return opt_out(view, protection)


def _name_of(view: Any) -> str:
    return f"{getattr(view, '__module__', '')}.{getattr(view, '__qualname__', type(view).__qualname__)}"


def _refuse_async(name: str, view: Any) -> None:
    if callable(view) and inspect.iscoroutinefunction(inspect.unwrap(view)):
        raise TypeError(f"{name} is asynchronous: transactions of Django are not, so make it an ordinary function")
