"""Who may do what, and that no tenant sees anything of another."""

import pytest
from api import Api
from tenants import PAYMENT, Tenant, each_operation, new_key

WRONG = [None, "", "Bearer", "Bearer acme", "Bearer acme:", "Bearer :alice", "Basic acme:alice", "Bearer a b:c"]


@pytest.mark.parametrize("login", WRONG)
@pytest.mark.parametrize("method, path", [
    ("POST", "/api/v1/batches"),
    ("GET", "/api/v1/batches/0f8fad5b-d9cb-469f-a165-70867728950e/requests"),
    ("GET", "/api/v1/requests/0f8fad5b-d9cb-469f-a165-70867728950e"),
    ("GET", "/nowhere"),
])
def test_not_logged_in(service, method, path, login):
    headers = {} if login is None else {"Authorization": login}
    answer = Api(service.url).send(method, path, headers=headers)
    assert answer.summary == (401, "NOT_LOGGED_IN")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


@each_operation
def test_not_logged_in_comes_before_the_key(operation, tenant, service, database):
    path = operation.path(tenant)
    before = database.everything()
    for key in (None, new_key()):
        assert Api(service.url).post(path, operation.body, key).summary == (401, "NOT_LOGGED_IN")
    assert database.everything() == before


RIGHTS = {
    "add_request": {"creator"},
    "approve_request": {"approver"},
    "reject_request": {"approver"},
    "mark_paid": {"creator", "approver"},
}


@each_operation
@pytest.mark.parametrize("role", ["creator", "approver", "auditor", "acreator"])
def test_rights(operation, role, tenant, database):
    path = operation.path(tenant)
    before = database.everything()
    key = new_key()
    answer = tenant.user(f"{role}7").post(path, operation.body, key)
    if role in RIGHTS[operation.view]:
        assert answer.status == operation.status
    else:
        assert answer.summary == (403, "FORBIDDEN")
        assert database.everything() == before


@pytest.mark.parametrize("role, status", [("creator", 201), ("approver", 403), ("auditor", 403)])
def test_rights_to_create_a_batch(role, status, tenant):
    assert tenant.user(f"{role}7").post("/api/v1/batches", {}, new_key()).status == status


@pytest.mark.parametrize("role", ["creator", "approver", "auditor"])
def test_everybody_of_the_tenant_may_read(role, tenant):
    batch = tenant.batch()
    request = tenant.pending(batch)
    user = tenant.user(f"{role}7")
    assert user.get(f"/api/v1/requests/{request}").data["id"] == request
    assert [data["id"] for data in user.get(f"/api/v1/batches/{batch}/requests").data] == [request]


def test_other_tenant_sees_nothing(tenant, service, database):
    other = Tenant(service)
    batch = tenant.batch()
    pending = tenant.pending(batch)
    approved = tenant.approved()
    rows = database.query("SELECT t::text FROM payments_paymentrequest AS t ORDER BY 1")

    assert other.creator.get(f"/api/v1/requests/{pending}").summary == (404, "REQUEST_NOT_FOUND")
    assert other.creator.get(f"/api/v1/batches/{batch}/requests").summary == (404, "BATCH_NOT_FOUND")
    answer = other.creator.post(f"/api/v1/batches/{batch}/requests", PAYMENT, new_key())
    assert answer.summary == (404, "BATCH_NOT_FOUND")
    for user, verb, request in (
        (other.approver, "approve", pending),
        (other.approver, "reject", pending),
        (other.creator, "mark-paid", approved),
    ):
        answer = user.post(f"/api/v1/requests/{request}/{verb}", {}, new_key())
        assert answer.summary == (404, "REQUEST_NOT_FOUND")

    assert database.query("SELECT t::text FROM payments_paymentrequest AS t ORDER BY 1") == rows
    assert database.value("SELECT size FROM payments_paymentbatch WHERE id = %s", batch) == 1
