"""A tenant with its users, and the four operations that need a key, each with what it takes to do it."""

import uuid
from dataclasses import dataclass
from typing import Callable

import pytest
from api import Api

PAYMENT = {
    "amount": "1000.00",
    "currency": "USD",
    "beneficiaryName": "Ada Lovelace",
    "beneficiaryAccount": "GB33BUKB20201555555555",
    "purpose": "Invoice 7",
}


def new_key():
    """A key that nobody has used."""
    return str(uuid.uuid4())


def id_in(path):
    """The id of the batch or payment request that a path is about."""
    return path.split("/")[4]


class Tenant:
    """A tenant that is new, with a creator and an approver."""

    def __init__(self, service):
        self.name = uuid.uuid4().hex
        self.creator = self.user("creator1", service)
        self.approver = self.user("approver1", service)
        self._service = service

    def user(self, name, service=None):
        """A client that is logged in as a user of this tenant."""
        return Api((service or self._service).url, f"{self.name}:{name}")

    def batch(self):
        """The id of a new batch."""
        return self._done(self.creator.post("/api/v1/batches"), 201)["id"]

    def pending(self, batch=None):
        """The id of a new payment request."""
        path = f"/api/v1/batches/{batch or self.batch()}/requests"
        return self._done(self.creator.post(path, PAYMENT, new_key()), 201)["id"]

    def approved(self):
        """The id of a payment request that is approved."""
        request = self.pending()
        self._done(self.approver.post(f"/api/v1/requests/{request}/approve", {}, new_key()), 200)
        return request

    def shown(self, request):
        """A payment request, as it is shown."""
        return self._done(self.creator.get(f"/api/v1/requests/{request}"), 200)

    def listed(self, batch):
        """The payment requests of a batch, as they are shown."""
        return self._done(self.creator.get(f"/api/v1/batches/{batch}/requests"), 200)

    def _done(self, answer, status):
        assert answer.status == status, answer
        return answer.data


@dataclass(frozen=True)
class Operation:
    """
    An operation that needs a key.

    view: the name of its view, and of its service.
    action: as it is called in the records.
    user: who may do it.
    body: what is sent, and other: the same with something different in it.
    status, result: what it is answered with, and what the payment request is then.
    path: makes a tenant ready for it, and returns the path.
    """

    view: str
    action: str
    user: str
    body: dict
    other: dict
    status: int
    result: str
    path: Callable

    def send(self, tenant, path, key, service=None):
        """Do it."""
        return tenant.user(self.user, service).post(path, self.body, key)


OPERATIONS = [
    Operation(
        view="add_request",
        action="CREATE_PAYMENT_REQUEST",
        user="creator1",
        body=PAYMENT,
        other={**PAYMENT, "amount": "1000.01"},
        status=201,
        result="PENDING",
        path=lambda tenant: f"/api/v1/batches/{tenant.batch()}/requests",
    ),
    Operation(
        view="approve_request",
        action="APPROVE_PAYMENT_REQUEST",
        user="approver1",
        body={"comment": "Approved"},
        other={"comment": "Approved after all"},
        status=200,
        result="APPROVED",
        path=lambda tenant: f"/api/v1/requests/{tenant.pending()}/approve",
    ),
    Operation(
        view="reject_request",
        action="REJECT_PAYMENT_REQUEST",
        user="approver1",
        body={"comment": "Too much"},
        other={"comment": "Far too much"},
        status=200,
        result="REJECTED",
        path=lambda tenant: f"/api/v1/requests/{tenant.pending()}/reject",
    ),
    Operation(
        view="mark_paid",
        action="MARK_PAYMENT_PAID",
        user="creator1",
        body={},
        other={"reference": "7"},
        status=200,
        result="PAID",
        path=lambda tenant: f"/api/v1/requests/{tenant.approved()}/mark-paid",
    ),
]
ADD, APPROVE, REJECT, MARK_PAID = OPERATIONS

each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.view)
