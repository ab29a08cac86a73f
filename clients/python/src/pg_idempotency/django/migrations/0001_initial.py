"""
What Django has to know of the records: a content type and the permissions. It makes no table.

The name of the table depends on the setting, and so it is asked for here as well.
"""

import pg_idempotency.django.fields
from django.db import migrations, models
from pg_idempotency.django.models import table


class Migration(migrations.Migration):
    initial = True
    operations = [
        migrations.CreateModel(
            name="Record",
            fields=[
                ("id", pg_idempotency.django.fields.ScopeField(editable=False, primary_key=True, serialize=False)),
                ("tenant", models.TextField()),
                ("action", models.TextField()),
                ("key", models.TextField()),
                ("actor", models.TextField()),
                (
                    "state",
                    pg_idempotency.django.fields.TextColumn(
                        choices=[("pending", "pending"), ("completed", "completed"), ("errored", "errored")]
                    ),
                ),
                ("attempt", models.IntegerField()),
                ("status_code", models.IntegerField(null=True)),
                ("headers", pg_idempotency.django.fields.TextColumn(null=True)),
                ("response", pg_idempotency.django.fields.TextColumn(null=True)),
                ("body", models.BinaryField(null=True)),
                ("claim", models.UUIDField(null=True)),
                ("recovery_point", models.TextField(null=True)),
                ("recovery_state", pg_idempotency.django.fields.TextColumn(null=True)),
                ("lease_expires_at", models.DateTimeField(null=True)),
                ("created_at", models.DateTimeField()),
                ("finished_at", models.DateTimeField(null=True)),
                ("expires_at", models.DateTimeField()),
            ],
            options={
                "db_table": table(),
                "managed": False,
                "default_permissions": ("view",),
                "permissions": [("view_answer", "Can view the answers that are kept")],
            },
        ),
    ]
