"""
Requests of Django that are done once: a middleware, a decorator and a mixin for views.

The answer of a view is kept by the database in the transaction of the view's work, so that both are there
or neither, and leaves after COMMIT. How to set it up is in django.md, beside the package's README.
"""

from .views import IdempotentViewMixin, idempotent_view
from .work import idempotent

__all__ = ["IdempotentViewMixin", "idempotent", "idempotent_view"]
