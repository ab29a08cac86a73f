"""
Requests and responses of Django, and what the core makes of them.

The body of a request is compared as it came. Two things are in the way of that:

- Who reads the stream of a request leaves nothing for others, unless ``request.body`` was asked for first.
  IdempotencyMiddleware does so for protected views, before parsers of forms and of REST framework come.
- The parts of a form with files are separated by a line that clients choose anew for each request. So of
  such a form its fields and files are compared, each file by a digest of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from django.http import HttpResponse
from django.http.request import RawPostDataException

from ..errors import AnswerTooLargeError, OutOfOrderError
from ..http import HttpOptions, Response
from ..types import Answer, Request, json_text
from . import drf

_FORM_WITH_FILES = "multipart/form-data"


def key_of(request: Any, options: HttpOptions) -> str | None:
    """
    The key in the headers of a request, or None if it may be missing and is.

    Servers join a header that was sent twice by a comma. Raises KeyMissingError, KeyInvalidError.
    """
    values = [request.headers[name] for name in options.names if name in request.headers]
    return options.key_of(values, joined=True)


def keep_body(request: Any) -> None:
    """Read the body while that is possible, so that it can be compared whoever reads it later: Django keeps it."""
    if request.content_type != _FORM_WITH_FILES:
        _body(request)


def fingerprint_of(request: Any, params: Mapping[str, Any], options: HttpOptions) -> Request:
    """
    What is compared: parameters of path and query, and the body.

    Raises OutOfOrderError if the body is gone, RequestInvalidError if it should be JSON and is not.
    """
    plain = drf.plain(request)
    query = [(name, value) for name, values in plain.GET.lists() for value in values]
    # Django reads forms of POST alone, REST framework those of all methods
    if plain.content_type == _FORM_WITH_FILES and (plain.method == "POST" or drf.view_of(request) is not None):
        return options.fingerprint_of(params, query, _FORM_WITH_FILES, _form(request))
    encoding = plain.META.get("HTTP_CONTENT_ENCODING", "identity").strip().lower()
    return options.fingerprint_of(
        params, query, plain.META.get("CONTENT_TYPE", ""), _body(plain), encoded=encoding not in ("", "identity")
    )


def _body(request: Any) -> bytes:
    try:
        return request.body
    except RawPostDataException as error:
        raise OutOfOrderError(
            "the body was read before it could be compared: put IdempotencyMiddleware into MIDDLEWARE, "
            "before any middleware that reads the stream of a request"
        ) from error


def _form(request: Any) -> bytes:
    """The fields and files of a form, in the order of their names' first coming."""
    fields, files = drf.form_of(request)
    return json_text(
        [
            [[name, values] for name, values in fields],
            [[name, [_file(file) for file in values]] for name, values in files],
        ]
    ).encode()


def _file(file: Any) -> list[Any]:
    digest = hashlib.sha256()
    for chunk in file.chunks():
        digest.update(chunk)
    file.seek(0)
    return [file.name, file.content_type, digest.hexdigest()]


def rewind_files(request: Any) -> None:
    """Have files of a form read from their beginning, by a view that is called again."""
    for _, files in drf.plain(request).FILES.lists():
        for file in files:
            file.seek(0)


def content_of(response: Any, limit: int) -> bytes:
    """
    The content of a response, which is rendered if it is not, and collected if it is streamed.

    limit: the largest answer, in bytes. Raises AnswerTooLargeError, and OutOfOrderError for a stream that
    can only be read asynchronously.
    """
    if response.streaming:
        if getattr(response, "is_async", False):
            raise OutOfOrderError("an asynchronous stream cannot be kept: let the answer have an ordinary iterator")
        content = _collected(response.streaming_content, limit)
        response.streaming_content = [content]
        return content
    if hasattr(response, "render") and not response.is_rendered:
        response.render()
    if len(response.content) > limit:
        raise _too_large(limit)
    return response.content


def _collected(stream: Iterable[bytes], limit: int) -> bytes:
    content = bytearray()
    for chunk in stream:
        content += chunk
        if len(content) > limit:
            raise _too_large(limit)
    return bytes(content)


def _too_large(limit: int) -> AnswerTooLargeError:
    return AnswerTooLargeError(f"the answer is larger than {limit} bytes")


def answer_of(response: Any, options: HttpOptions) -> Answer:
    """What is kept of a response. Its cookies are not. Raises as ``content_of``."""
    content = content_of(response, options.max_answer)
    headers = [(name.lower(), value) for name, value in response.items()]
    return options.answer_of(Response(response.status_code, headers, content))


def response_of(response: Response) -> HttpResponse:
    """A response of the core as one of Django, with its header fields and no others."""
    new = HttpResponse(response.body, status=response.status)
    del new["Content-Type"]
    for name, value in response.headers:
        title = name.title()
        new[title] = f"{new[title]}, {value}" if title in new else value
    return new


def params_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a path: by name, or by number for those that have none."""
    return {**{str(number): value for number, value in enumerate(args)}, **kwargs}
