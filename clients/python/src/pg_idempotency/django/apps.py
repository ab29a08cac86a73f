"""The app, for INSTALLED_APPS: ``"pg_idempotency.django"``."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import register

from .checks import check_idempotency


class IdempotencyConfig(AppConfig):
    """Records of idempotency, their admin, checks and the management command."""

    name = "pg_idempotency.django"
    label = "pg_idempotency"
    verbose_name = "Idempotency"
    default_auto_field = "django.db.models.AutoField"

    def ready(self) -> None:
        """Have ``manage.py check`` look at the setting."""
        register(check_idempotency)
