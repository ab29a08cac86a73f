"""
``manage.py idempotency health`` tells how the extension is, and ``manage.py idempotency sweep`` deletes expired
records.

``health`` ends with status 1 when there is something to see to, so that a monitor can call it.
"""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error, connections
from pg_idempotency.django.options import default_schema, default_using


class Command(BaseCommand):
    """Health and sweeping of the extension."""

    help = "Shows how the extension idempotency is, or deletes expired records."

    def add_arguments(self, parser: CommandParser) -> None:
        """What can be said on the command line."""
        calls = parser.add_subparsers(dest="call", required=True)
        health = calls.add_parser("health", help="show how it is; the status is 1 when something is wrong")
        sweep = calls.add_parser("sweep", help="delete expired records, batch by batch")
        for call in (health, sweep):
            call.add_argument("--database", default=default_using(), help="the alias of the database")
        sweep.add_argument("--batch-size", type=int, help="how many records are deleted in one transaction")
        sweep.add_argument("--max-duration", help='no batch starts later, such as "30 s"')

    def handle(self, *args: Any, **options: Any) -> None:
        """Make the call. Raises CommandError when it fails, or when something is wrong."""
        connection = connections[options["database"]]
        schema = connection.ops.quote_name(default_schema())
        try:
            if options["call"] == "health":
                self._health(connection, schema)
            else:
                self._sweep(connection, schema, options["batch_size"], options["max_duration"])
        except Error as error:
            raise CommandError(str(error).strip()) from error

    def _health(self, connection: Any, schema: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT * FROM {schema}.idempotency_health")
            row = cursor.fetchone()
            names = [column[0] for column in cursor.description]
        found = dict(zip(names, row))
        warnings = found.pop("warnings")
        for name, value in found.items():
            self.stdout.write(f"{name}: {'' if value is None else value}".rstrip())
        if warnings:
            raise CommandError("\n".join(warnings))
        self.stdout.write(self.style.SUCCESS("All is well."))

    def _sweep(self, connection: Any, schema: str, batch_size: int | None, max_duration: str | None) -> None:
        if connection.in_atomic_block or not connection.get_autocommit():
            raise CommandError("a sweep commits after each batch: no transaction may be open, and autocommit must be on")
        with connection.cursor() as cursor:
            cursor.execute(
                f"CALL {schema}.idempotency_sweep(%s::int, %s::text::interval)", [batch_size, max_duration]
            )
        self.stdout.write(self.style.SUCCESS("Expired records are swept."))
