"""An operation for migrations of an application: the extension in its database."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import router
from django.db.migrations.operations.base import Operation

_WHERE = """
SELECT nspname FROM pg_catalog.pg_extension JOIN pg_catalog.pg_namespace AS n ON n.oid = extnamespace
WHERE extname = 'idempotency'
"""


class CreateIdempotency(Operation):
    """
    Create the extension in a schema, unless it is there already. A superuser has to do that; where migrations
    are run by somebody else, an administrator creates it before, and this sees that it is there.

    Going back leaves it where it is: its records protect requests whose answers have left.

    schema: the schema, which is created as well. Raises ImproperlyConfigured if the extension is in another.
    """

    reversible = True

    def __init__(self, schema: str = "idempotency") -> None:
        self.schema = schema

    def state_forwards(self, app_label: str, state: Any) -> None:
        """Models do not change."""

    def database_forwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Create the extension."""
        connection = schema_editor.connection
        if connection.vendor != "postgresql" or not router.allow_migrate(connection.alias, app_label):
            return
        with connection.cursor() as cursor:
            cursor.execute(_WHERE)
            found = cursor.fetchone()
        if found is None:
            schema = connection.ops.quote_name(self.schema)
            schema_editor.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
            schema_editor.execute(f"CREATE EXTENSION idempotency SCHEMA {schema}")
        elif found[0] != self.schema:
            raise ImproperlyConfigured(f"the extension idempotency is in schema {found[0]}, not in {self.schema}")

    def database_backwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Leave the extension where it is."""

    def describe(self) -> str:
        """What is shown when migrations run."""
        return f"Create the extension idempotency in schema {self.schema}"

    @property
    def migration_name_fragment(self) -> str:
        """A part of the name of a migration that has nothing else."""
        return "create_idempotency"
