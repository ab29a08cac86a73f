"""The extension."""

from django.db import migrations
from pg_idempotency.django.operations import CreateIdempotency


class Migration(migrations.Migration):
    operations = [CreateIdempotency(schema="idempotency")]
