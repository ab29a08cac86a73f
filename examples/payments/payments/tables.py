"""The tables of the service, made when it starts."""

from django.core.management import call_command
from django.db import connection

#: Any number: services that start together take this lock one after the other.
_LOCK = 7046126


def create_tables():
    """Make the tables that are missing, and close the connection, which must not be shared with a fork."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
        call_command("migrate", interactive=False, verbosity=0)
    finally:
        connection.close()
