"""
The one shape of all errors: ``{"error": {"code", "message", "details"}}``.

A ``DomainError`` is raised from however deep inside. In a view that is idempotent it is the answer of the
request: it is kept under the key, and what was written before it is rolled back.
"""

from django.db import OperationalError
from django.http import JsonResponse
from pg_idempotency import Refusal


def error_body(code, message, /, **details):
    """An error, as a value for JSON."""
    return {"error": {"code": code, "message": message, "details": details}}


def error_response(status, code, message, /, **details):
    """A response that says what went wrong."""
    return JsonResponse(error_body(code, message, **details), status=status)


class DomainError(Refusal):
    """A request that is refused, with what a client is told."""

    def __init__(self, status, code, message, /, **details):
        super().__init__(status, error_body(code, message, **details))


class ErrorMiddleware:
    """Answers a DomainError of a view that is not idempotent, and says so if the database cannot be reached."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        return self.get_response(request)

    def process_exception(self, request, exception):
        if isinstance(exception, DomainError):
            return JsonResponse(exception.answer.json(), status=exception.answer.status)
        if isinstance(exception, OperationalError):
            response = error_response(503, "DATABASE_UNAVAILABLE", "The request could not be done now")
            response["Retry-After"] = "1"
            return response
        return None


def problem(problem):
    """A problem with a key, in the shape of all errors: content type and value of the body."""
    details = {} if problem.retry_after is None else {"retryAfter": problem.retry_after}
    return "application/json", error_body(problem.code, problem.detail, **details)


def not_found(request, exception):
    """The answer for a path that leads nowhere."""
    return error_response(404, "NOT_FOUND", "There is nothing at this path")


def internal_error(request):
    """The answer after an exception, of which the log tells more."""
    return error_response(500, "INTERNAL_ERROR", "An error occurred")
