"""Settings of the project. The database is that of DATABASE_URL."""

import os
from urllib.parse import urlsplit

_server = urlsplit(os.environ["DATABASE_URL"])

SECRET_KEY = "for tests"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "shop.urls"
USE_TZ = True

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "rest_framework",
    "pg_idempotency.django",
    "shop",
    "probe",
]

MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "pg_idempotency.django.middleware.IdempotencyMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]

IDEMPOTENCY = {
    "actor": "shop.scope.actor_of",
}

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _server.path.lstrip("/"),
        "HOST": _server.hostname,
        "PORT": str(_server.port),
        "USER": _server.username,
        "ATOMIC_REQUESTS": os.environ.get("ATOMIC_REQUESTS") == "on",
    }
}

DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
