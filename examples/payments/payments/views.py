"""
What is answered over HTTP.

The views that are idempotent hand ``request.idempotency`` on to a service, which says what the answer is.
One that forgets it cannot commit: nobody finishes the claim then, and the database refuses.
"""

from django.db import connection
from django.http import JsonResponse
from pg_idempotency.django import idempotent_view

from . import services
from .forms import CommentForm, PaymentRequestForm, read
from .login import allowed_to
from .serializers import payment_request_data


def health(request):
    """GET /health: 200 when the database can be reached, else 503."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return JsonResponse({"status": "ok"})


@allowed_to("creator")
@idempotent_view(action="CREATE_PAYMENT_BATCH", required=False)
def create_batch(request):
    """POST /api/v1/batches: create a batch. A key is not needed: an empty batch too many does no harm."""
    batch = services.create_batch(request.user)
    return JsonResponse({"data": {"id": batch.id}}, status=201)


def list_requests(request, batchId):
    """GET /api/v1/batches/{batchId}/requests: the payment requests of a batch."""
    found = services.list_requests(batchId, request.user)
    return JsonResponse({"data": [payment_request_data(payment_request) for payment_request in found]})


def get_request(request, requestId):
    """GET /api/v1/requests/{requestId}: a payment request with its approvals."""
    return JsonResponse({"data": payment_request_data(services.get_request(requestId, request.user))})


@allowed_to("creator")
@idempotent_view(action="CREATE_PAYMENT_REQUEST", finished_by="service")
def add_request(request, batchId):
    """POST /api/v1/batches/{batchId}/requests: add a payment request to a batch."""
    body = read(PaymentRequestForm, request)
    services.add_request(
        batchId,
        request.user,
        body["amount"],
        body["currency"],
        body["beneficiaryName"],
        body["beneficiaryAccount"],
        body["purpose"],
        idempotency=request.idempotency,
    )


@allowed_to("approver")
@idempotent_view(action="APPROVE_PAYMENT_REQUEST", finished_by="service")
def approve_request(request, requestId):
    """POST /api/v1/requests/{requestId}/approve: approve a payment request."""
    body = read(CommentForm, request)
    services.approve_request(
        requestId,
        request.user,
        body["comment"],
        idempotency=request.idempotency,
    )


@allowed_to("approver")
@idempotent_view(action="REJECT_PAYMENT_REQUEST", finished_by="service")
def reject_request(request, requestId):
    """POST /api/v1/requests/{requestId}/reject: reject a payment request."""
    body = read(CommentForm, request)
    services.reject_request(
        requestId,
        request.user,
        body["comment"],
        idempotency=request.idempotency,
    )


@allowed_to("creator", "approver")
@idempotent_view(action="MARK_PAYMENT_PAID", finished_by="service")
def mark_paid(request, requestId):
    """POST /api/v1/requests/{requestId}/mark-paid: note that a payment request was paid."""
    services.mark_paid(
        requestId,
        request.user,
        idempotency=request.idempotency,
    )
