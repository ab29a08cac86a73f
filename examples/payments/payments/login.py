"""
Who asks: a demonstration token ``Authorization: Bearer TENANT:USER``, and rights by the name of the user.

The login comes before everything else. An answer that is kept belongs to tenant, user and key, so whoever is
not logged in gets none, and a 401 or 403 is no answer of a key.
"""

import re
from dataclasses import dataclass
from functools import wraps

from .errors import error_response

_TOKEN = re.compile(r"Bearer ([\x21-\x39\x3b-\x7e]+):([\x21-\x7e]+)")


@dataclass(frozen=True)
class User:
    """A user of a tenant. What the name begins with is the role."""

    tenant: str
    name: str


class LoginMiddleware:
    """Sets ``request.user``, or answers 401."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        token = _TOKEN.fullmatch(request.headers.get("Authorization", ""))
        if token:
            request.user = User(*token.groups())
        elif request.path != "/health":
            response = error_response(401, "NOT_LOGGED_IN", "Authorization: Bearer TENANT:USER is missing")
            response["WWW-Authenticate"] = "Bearer"
            return response
        return self.get_response(request)


def tenant_of(request):
    """Whose data a request is about."""
    return request.user.tenant


def actor_of(request):
    """Who sent a request."""
    return request.user.name


def allowed_to(*roles):
    """Have a view answer 403 to everybody without one of these roles. It belongs outside of ``idempotent_view``."""

    def decorate(view):
        @wraps(view)
        def checked(request, **parameters):
            if request.user.name.startswith(roles):
                return view(request, **parameters)
            return error_response(403, "FORBIDDEN", "Your role does not allow this", roles=roles)

        return checked

    return decorate
