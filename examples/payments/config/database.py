"""The database in DATABASE_URL, as Django wants to have it described."""

from contextlib import closing

import psycopg2
from psycopg2.extensions import parse_dsn


def database_of(url):
    """An entry of DATABASES for the URL of a database, as libpq reads it."""
    options = parse_dsn(url)
    parts = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    described = {part: options.pop(name, "") for part, name in parts.items()}
    return {"ENGINE": "django.db.backends.postgresql", **described, "OPTIONS": options}


def extension_schema(url):
    """The schema that the extension is in. Raises RuntimeError if the database does not have it."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT nspname FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace"
            " WHERE extname = 'idempotency'"
        )
        row = cursor.fetchone()
    if row is None:
        raise RuntimeError("the database does not have the extension: CREATE EXTENSION idempotency")
    return row[0]
