"""
What can be done with batches and payment requests.

Each function that changes something works in the transaction of its caller and takes ``idempotency``: the
claim of the request, in which it says what the answer is. That is the last link of the chain from the
header to the database. Callers without a request, such as a shell, leave it out.
"""

from django.db.models import F
from django.utils import timezone

from .errors import DomainError
from .models import ApprovalRecord, PaymentBatch, PaymentRequest
from .serializers import payment_request_data

#: How many payment requests a batch has at most.
MAX_REQUESTS = 10_000

Status = PaymentRequest.Status
Decision = ApprovalRecord.Decision


def create_batch(user):
    """Create an empty batch."""
    return PaymentBatch.objects.create(tenant=user.tenant, created_by=user.name)


def add_request(
    batch_id, user, amount, currency, beneficiary_name, beneficiary_account, purpose, *, idempotency=None
):
    """Add a payment request to a batch. Raises DomainError if the batch is full, or not there."""
    # the count is written first, so that of two requests at once each has a number of its own
    PaymentBatch.objects.filter(id=batch_id, tenant=user.tenant).update(size=F("size") + 1)
    batch = get_batch(batch_id, user)
    if batch.size > MAX_REQUESTS:
        raise DomainError(422, "BATCH_FULL", f"A batch has at most {MAX_REQUESTS} requests")
    payment_request = PaymentRequest.objects.create(
        batch=batch,
        number=batch.size,
        amount=amount,
        currency=currency,
        beneficiary_name=beneficiary_name,
        beneficiary_account=beneficiary_account,
        purpose=purpose,
        created_by=user.name,
    )
    return _finish(idempotency, 201, payment_request)


def approve_request(request_id, user, comment="", *, idempotency=None):
    """Approve a pending payment request. Raises DomainError if it is not pending, or not there."""
    return _decide(request_id, user, Decision.APPROVED, comment, idempotency)


def reject_request(request_id, user, comment="", *, idempotency=None):
    """Reject a pending payment request. Raises DomainError if it is not pending, or not there."""
    return _decide(request_id, user, Decision.REJECTED, comment, idempotency)


def mark_paid(request_id, user, *, idempotency=None):
    """Note that an approved payment request was paid. Raises DomainError if it is not approved, or not there."""
    payment_request = _locked(request_id, user, Status.APPROVED)
    payment_request.status = Status.PAID
    payment_request.paid_by = user.name
    payment_request.paid_at = timezone.now()
    payment_request.save()
    return _finish(idempotency, 200, payment_request)


def get_batch(batch_id, user):
    """A batch of the user's tenant. Raises DomainError if there is none."""
    batch = PaymentBatch.objects.filter(id=batch_id, tenant=user.tenant).first()
    if batch is None:
        raise DomainError(404, "BATCH_NOT_FOUND", "There is no such batch")
    return batch


def get_request(request_id, user):
    """A payment request of the user's tenant. Raises DomainError if there is none."""
    return _found(PaymentRequest.objects, request_id, user)


def list_requests(batch_id, user):
    """The payment requests of a batch, in the order in which they came. Raises DomainError as ``get_batch`` does."""
    return get_batch(batch_id, user).requests.prefetch_related("approvals").order_by("number")


def _decide(request_id, user, decision, comment, idempotency):
    payment_request = _locked(request_id, user, Status.PENDING)
    ApprovalRecord.objects.create(
        payment_request=payment_request, decision=decision, approver=user.name, comment=comment
    )
    payment_request.status = decision.value
    payment_request.save()
    return _finish(idempotency, 200, payment_request)


def _locked(request_id, user, status):
    """A payment request that must have a status, locked so that it keeps it until the transaction is over."""
    payment_request = _found(PaymentRequest.objects.select_for_update(of=("self",)), request_id, user)
    if payment_request.status != status:
        raise DomainError(
            422,
            "INVALID_STATUS",
            f"The payment request is {payment_request.status}, and not {status}",
            status=payment_request.status,
        )
    return payment_request


def _found(payment_requests, request_id, user):
    payment_request = payment_requests.filter(id=request_id, batch__tenant=user.tenant).first()
    if payment_request is None:
        raise DomainError(404, "REQUEST_NOT_FOUND", "There is no such payment request")
    return payment_request


def _finish(idempotency, status, payment_request):
    """Say that the work is done, and what its answer is."""
    if idempotency is not None:
        idempotency.finish(status, {"data": payment_request_data(payment_request)})
    return payment_request
