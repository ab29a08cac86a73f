"""
The settings of the service.

There are no sessions and no cookies, so nothing of Django is installed that is for those.
"""

import os

from .database import database_of, extension_schema

_URL = os.environ["DATABASE_URL"]

DATABASES = {"default": database_of(_URL)}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = ["payments", "pg_idempotency.django"]
MIDDLEWARE = [
    "payments.login.LoginMiddleware",
    "payments.errors.ErrorMiddleware",
    "pg_idempotency.django.middleware.IdempotencyMiddleware",
]
IDEMPOTENCY = {
    "tenant": "payments.login.tenant_of",
    "actor": "payments.login.actor_of",
    "problem": "payments.errors.problem",
    "schema": extension_schema(_URL),
}

ROOT_URLCONF = "config.urls"
WSGI_APPLICATION = "config.wsgi.application"
APPEND_SLASH = False

# nothing is signed, and no link is made of the name by which a client calls the host
SECRET_KEY = "this is a demonstration"
ALLOWED_HOSTS = ["*"]

USE_TZ = True
TIME_ZONE = "UTC"

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "INFO"},
}
