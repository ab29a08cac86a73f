"""
Views of REST framework, without depending on it.

A request of REST framework wraps that of Django and knows its view, which turns exceptions into responses
and chooses what renders them. All that happens outside of the view's method, so here it is done inside.
"""

from __future__ import annotations

from typing import Any


def view_of(request: Any) -> Any:
    """The view of a request of REST framework; None for any other request."""
    context = getattr(request, "parser_context", None)
    return context and context.get("view")


def plain(request: Any) -> Any:
    """The request of Django."""
    return getattr(request, "_request", request)


def form_of(request: Any) -> tuple[list[Any], list[Any]]:
    """The fields and the files of a form, each as names with lists of values."""
    if view_of(request) is None:
        return list(request.POST.lists()), list(request.FILES.lists())
    # REST framework puts the files among the fields as well
    files = list(request.FILES.lists())
    fields = [
        (name, [value for value in values if not hasattr(value, "chunks")]) for name, values in request.data.lists()
    ]
    return [(name, values) for name, values in fields if values], files


def response_to(request: Any, error: Exception) -> Any:
    """The response that a view of REST framework makes of an error. Raises the error if it makes none."""
    view = view_of(request)
    if view is None:
        raise error
    return view.handle_exception(error)


def prepare(request: Any, response: Any) -> None:
    """Let what was negotiated for the request render a response, as its view does later."""
    view = view_of(request)
    if view is None or not hasattr(response, "data"):
        return
    response.accepted_renderer = request.accepted_renderer
    response.accepted_media_type = request.accepted_media_type
    response.renderer_context = view.get_renderer_context()


def is_class_of(view: Any) -> bool:
    """Whether a view is what ``as_view`` of REST framework or ``@api_view`` has made."""
    return hasattr(view, "cls")


def functions_of(view: Any) -> list[Any]:
    """The functions below ``@api_view``, which only the methods of its class know."""
    handlers = [getattr(view.cls, name, None) for name in view.cls.http_method_names] if is_class_of(view) else []
    return [cell.cell_contents for handler in handlers for cell in getattr(handler, "__closure__", None) or ()]
