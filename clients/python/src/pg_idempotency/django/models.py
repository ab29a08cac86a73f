"""
The records of the extension, to look at.

Django neither makes nor changes the table, and nothing is written to it from here: a record that was written
by hand would be an answer that nobody gave.
"""

from __future__ import annotations

from typing import Any, NoReturn

from django.db import models

from ..types import Scope
from .fields import ScopeField, TextColumn
from .options import default_schema, default_using


def table() -> str:
    """The table of records, with the schema that the setting names, as Django leaves it when it quotes names."""
    return f'"{default_schema()}"."idempotency_key"'


def _refuse() -> NoReturn:
    raise TypeError("records of idempotency are written by the functions of the extension, and by nothing else")


class RecordQuerySet(models.QuerySet):
    """Records, read-only. Whatever would write raises TypeError."""

    def update(self, **values: Any) -> NoReturn:
        _refuse()

    def delete(self) -> NoReturn:
        _refuse()

    def bulk_create(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse()

    def bulk_update(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse()


class RecordManager(models.Manager):
    """Records of the database that the setting names, unless another is asked for."""

    def get_queryset(self) -> RecordQuerySet:
        return RecordQuerySet(self.model, using=self._db or default_using())


class Record(models.Model):
    """One request: pending, completed or errored, with its answer."""

    id = ScopeField(primary_key=True, editable=False)
    tenant = models.TextField()
    action = models.TextField()
    key = models.TextField()
    actor = models.TextField()
    state = TextColumn(choices=[(state, state) for state in ("pending", "completed", "errored")])
    attempt = models.IntegerField()
    status_code = models.IntegerField(null=True)
    headers = TextColumn(null=True)
    response = TextColumn(null=True)
    body = models.BinaryField(null=True)
    claim = models.UUIDField(null=True)
    recovery_point = models.TextField(null=True)
    recovery_state = TextColumn(null=True)
    lease_expires_at = models.DateTimeField(null=True)
    created_at = models.DateTimeField()
    finished_at = models.DateTimeField(null=True)
    expires_at = models.DateTimeField()

    objects = RecordManager()

    class Meta:
        managed = False
        db_table = table()
        default_permissions = ("view",)
        permissions = [("view_answer", "Can view the answers that are kept")]

    def __str__(self) -> str:
        return f"{self.action} {self.key}"

    @property
    def scope(self) -> Scope:
        """What the request is known by."""
        return Scope(tenant=self.tenant, action=self.action, key=self.key, actor=self.actor)

    def save(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises TypeError."""
        _refuse()

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises TypeError."""
        _refuse()
