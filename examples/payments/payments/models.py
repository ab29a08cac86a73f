"""
Batches of payment requests, and what was decided about each.

A payment request is PENDING until somebody approves or rejects it, which is recorded once; an approved one
is PAID in the end. Amounts are decimals: a float cannot hold 0.10.
"""

import uuid

from django.db import models


class PaymentBatch(models.Model):
    """
    What payment requests are collected in; it belongs to a tenant.

    size: how many there are.
    """

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    tenant = models.TextField()
    size = models.IntegerField(default=0)
    created_by = models.TextField()
    created_at = models.DateTimeField(auto_now_add=True)


class PaymentRequest(models.Model):
    """
    A wish to pay somebody.

    number: which of its batch it is, counted from 1 without gaps.
    """

    class Status(models.TextChoices):
        PENDING = "PENDING"
        APPROVED = "APPROVED"
        REJECTED = "REJECTED"
        PAID = "PAID"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    batch = models.ForeignKey(PaymentBatch, on_delete=models.PROTECT, related_name="requests")
    number = models.IntegerField()
    amount = models.DecimalField(max_digits=18, decimal_places=2)
    currency = models.TextField()
    beneficiary_name = models.TextField()
    beneficiary_account = models.TextField()
    purpose = models.TextField()
    status = models.TextField(choices=Status.choices, default=Status.PENDING)
    created_by = models.TextField()
    created_at = models.DateTimeField(auto_now_add=True)
    paid_by = models.TextField(null=True)
    paid_at = models.DateTimeField(null=True)


class ApprovalRecord(models.Model):
    """Who decided about a payment request, and how."""

    class Decision(models.TextChoices):
        APPROVED = "APPROVED"
        REJECTED = "REJECTED"

    payment_request = models.ForeignKey(PaymentRequest, on_delete=models.PROTECT, related_name="approvals")
    decision = models.TextField(choices=Decision.choices)
    approver = models.TextField()
    comment = models.TextField()
    created_at = models.DateTimeField(auto_now_add=True)
