"""The tables of the service."""

import uuid

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True
    dependencies = []

    operations = [
        migrations.CreateModel(
            name="PaymentBatch",
            fields=[
                ("id", models.UUIDField(default=uuid.uuid4, editable=False, primary_key=True, serialize=False)),
                ("tenant", models.TextField()),
                ("size", models.IntegerField(default=0)),
                ("created_by", models.TextField()),
                ("created_at", models.DateTimeField(auto_now_add=True)),
            ],
        ),
        migrations.CreateModel(
            name="PaymentRequest",
            fields=[
                ("id", models.UUIDField(default=uuid.uuid4, editable=False, primary_key=True, serialize=False)),
                (
                    "batch",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="requests",
                        to="payments.paymentbatch",
                    ),
                ),
                ("number", models.IntegerField()),
                ("amount", models.DecimalField(decimal_places=2, max_digits=18)),
                ("currency", models.TextField()),
                ("beneficiary_name", models.TextField()),
                ("beneficiary_account", models.TextField()),
                ("purpose", models.TextField()),
                (
                    "status",
                    models.TextField(
                        choices=[
                            ("PENDING", "Pending"),
                            ("APPROVED", "Approved"),
                            ("REJECTED", "Rejected"),
                            ("PAID", "Paid"),
                        ],
                        default="PENDING",
                    ),
                ),
                ("created_by", models.TextField()),
                ("created_at", models.DateTimeField(auto_now_add=True)),
                ("paid_by", models.TextField(null=True)),
                ("paid_at", models.DateTimeField(null=True)),
            ],
        ),
        migrations.CreateModel(
            name="ApprovalRecord",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                (
                    "payment_request",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="approvals",
                        to="payments.paymentrequest",
                    ),
                ),
                ("decision", models.TextField(choices=[("APPROVED", "Approved"), ("REJECTED", "Rejected")])),
                ("approver", models.TextField()),
                ("comment", models.TextField()),
                ("created_at", models.DateTimeField(auto_now_add=True)),
            ],
        ),
    ]
