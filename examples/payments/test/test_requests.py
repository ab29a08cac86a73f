"""What the service does, apart from keys: amounts, bodies, states, paths."""

import json
from datetime import datetime

import pytest
from api import Api
from tenants import PAYMENT, new_key

UNKNOWN = "0f8fad5b-d9cb-469f-a165-70867728950e"


def test_life_of_a_payment_request(tenant):
    batch = tenant.batch()
    added = tenant.creator.post(f"/api/v1/batches/{batch}/requests", PAYMENT, new_key()).data
    created_at = datetime.fromisoformat(added["createdAt"])
    assert created_at.utcoffset().total_seconds() == 0
    assert added == {
        "id": added["id"],
        "batchId": batch,
        "number": 1,
        "amount": "1000.00",
        "currency": "USD",
        "beneficiaryName": "Ada Lovelace",
        "beneficiaryAccount": "GB33BUKB20201555555555",
        "purpose": "Invoice 7",
        "status": "PENDING",
        "createdBy": "creator1",
        "createdAt": added["createdAt"],
        "paidBy": None,
        "paidAt": None,
        "approvals": [],
    }
    assert tenant.shown(added["id"]) == added

    path = f"/api/v1/requests/{added['id']}"
    approved = tenant.approver.post(f"{path}/approve", {"comment": "Fine"}, new_key()).data
    (approval,) = approved["approvals"]
    assert approval == {
        "decision": "APPROVED",
        "approver": "approver1",
        "comment": "Fine",
        "createdAt": approval["createdAt"],
    }
    assert datetime.fromisoformat(approval["createdAt"]) > created_at
    assert approved == {**added, "status": "APPROVED", "approvals": [approval]}
    assert tenant.shown(added["id"]) == approved

    paid = tenant.creator.post(f"{path}/mark-paid", None, new_key()).data
    assert datetime.fromisoformat(paid["paidAt"]) > created_at
    assert paid == {**approved, "status": "PAID", "paidBy": "creator1", "paidAt": paid["paidAt"]}
    assert tenant.shown(added["id"]) == paid


def test_rejected_payment_request_has_its_record(tenant):
    request = tenant.pending()
    rejected = tenant.approver.post(f"/api/v1/requests/{request}/reject", {"comment": "No"}, new_key()).data
    assert rejected["status"] == "REJECTED"
    assert [(record["decision"], record["comment"]) for record in rejected["approvals"]] == [("REJECTED", "No")]
    assert tenant.shown(request) == rejected


def test_batch_lists_its_requests_in_order(tenant):
    batch = tenant.batch()
    tenant.pending()
    requests = [tenant.pending(batch) for _ in range(3)]
    listed = tenant.listed(batch)
    assert [(data["id"], data["number"]) for data in listed] == list(zip(requests, (1, 2, 3)))
    assert listed == [tenant.shown(request) for request in requests]


REFUSED = {
    "PENDING": ["mark-paid"],
    "APPROVED": ["approve", "reject"],
    "REJECTED": ["approve", "reject", "mark-paid"],
    "PAID": ["approve", "reject", "mark-paid"],
}
WAY = {"PENDING": [], "APPROVED": ["approve"], "REJECTED": ["reject"], "PAID": ["approve", "mark-paid"]}


@pytest.mark.parametrize("status, verb", [(status, verb) for status, verbs in REFUSED.items() for verb in verbs])
def test_refused_transition_is_kept(status, verb, tenant, database):
    request = tenant.pending()
    for step in WAY[status]:
        assert tenant.approver.post(f"/api/v1/requests/{request}/{step}", {}, new_key()).status == 200
    before = tenant.shown(request)
    key = new_key()
    path = f"/api/v1/requests/{request}/{verb}"
    first, repeat = (tenant.approver.post(path, {}, key) for _ in range(2))

    assert first.summary == (422, "INVALID_STATUS")
    assert first.error["details"] == {"status": status}
    assert (repeat.status, repeat.replayed, repeat.content) == (422, True, first.content)
    assert [record[3:] for record in database.records(key)] == [("errored", 422)]
    assert tenant.shown(request) == before


def test_refusal_stays_although_it_would_be_possible_later(tenant):
    """Who was told that a payment is not approved must not find it paid by a repeat that was under way."""
    request = tenant.pending()
    key = new_key()
    path = f"/api/v1/requests/{request}/mark-paid"
    refused = tenant.creator.post(path, {}, key)
    assert tenant.approver.post(f"/api/v1/requests/{request}/approve", {}, new_key()).status == 200
    repeat = tenant.creator.post(path, {}, key)
    assert (repeat.status, repeat.replayed, repeat.content) == (422, True, refused.content)
    assert tenant.shown(request)["status"] == "APPROVED"
    assert tenant.creator.post(path, {}, new_key()).data["status"] == "PAID"


def test_refusal_is_kept_and_what_it_wrote_is_rolled_back(tenant, database):
    """The count of a batch is written before it turns out to be full."""
    batch = tenant.batch()
    database.query("UPDATE payments_paymentbatch SET size = 9999 WHERE id = %s", batch)
    path = f"/api/v1/batches/{batch}/requests"
    last = tenant.creator.post(path, PAYMENT, new_key())
    assert (last.status, last.data["number"]) == (201, 10_000)
    key = new_key()
    refused = tenant.creator.post(path, PAYMENT, key)

    assert refused.summary == (422, "BATCH_FULL")
    assert database.value("SELECT size FROM payments_paymentbatch WHERE id = %s", batch) == 10_000
    assert tenant.listed(batch) == [last.data]
    assert [record[3:] for record in database.records(key)] == [("errored", 422)]

    database.query("UPDATE payments_paymentbatch SET size = 1 WHERE id = %s", batch)
    repeat = tenant.creator.post(path, PAYMENT, key)
    assert (repeat.status, repeat.replayed, repeat.content) == (422, True, refused.content)
    assert tenant.creator.post(path, PAYMENT, new_key()).data["number"] == 2


@pytest.mark.parametrize("amount, shown", [
    ('"1000.00"', "1000.00"),
    ('"0.01"', "0.01"),
    ('"7"', "7.00"),
    ("12.5", "12.50"),
    ("0.10", "0.10"),
    ('"9999999999999999.99"', "9999999999999999.99"),
    ("9999999999999999.99", "9999999999999999.99"),
])
def test_amount_is_what_was_sent(amount, shown, tenant):
    batch = tenant.batch()
    body = json.dumps(PAYMENT).replace('"1000.00"', amount).encode()
    answer = tenant.creator.post(f"/api/v1/batches/{batch}/requests", body, new_key())
    assert answer.data["amount"] == shown
    assert tenant.listed(batch)[0]["amount"] == shown


BAD_AMOUNTS = [
    *('"0"', '"0.00"', "0", '"-1"', "-1", '"1.001"', "1.001", '"1e3"', "1e3", '"NaN"', '"Infinity"', '"1_000"'),
    *('"1,000.00"', '"ten"', '""', "null", "true", "[1]", '"10000000000000000"', '"\u0661"'),
]


@pytest.mark.parametrize("amount", BAD_AMOUNTS)
def test_bad_amount(amount, tenant, database):
    batch = tenant.batch()
    key = new_key()
    body = json.dumps(PAYMENT).replace('"1000.00"', amount).encode()
    path = f"/api/v1/batches/{batch}/requests"
    answer, repeat = (tenant.creator.post(path, body, key) for _ in range(2))
    assert answer.summary == (400, "VALIDATION_ERROR")
    assert list(answer.error["details"]) == ["amount"]
    assert tenant.listed(batch) == []
    assert [record[3:] for record in database.records(key)] == [("errored", 400)]
    assert (repeat.replayed, repeat.content) == (True, answer.content)


@pytest.mark.parametrize("name, value", [
    ("currency", "usd"),
    ("currency", "USDT"),
    ("currency", "USD\n"),
    ("beneficiaryName", ""),
    ("beneficiaryName", "x" * 201),
    ("beneficiaryAccount", None),
    ("beneficiaryAccount", 7),
    ("purpose", ["a"]),
])
def test_bad_value(name, value, tenant):
    path = f"/api/v1/batches/{tenant.batch()}/requests"
    answer = tenant.creator.post(path, {**PAYMENT, name: value}, new_key())
    assert answer.summary == (400, "VALIDATION_ERROR")
    (message,) = answer.error["details"][name]
    assert message
    assert list(answer.error["details"]) == [name]


def test_all_that_is_missing_is_named(tenant):
    answer = tenant.creator.post(f"/api/v1/batches/{tenant.batch()}/requests", {}, new_key())
    assert answer.summary == (400, "VALIDATION_ERROR")
    assert list(answer.error["details"]) == ["amount", "currency", "beneficiaryName", "beneficiaryAccount", "purpose"]


@pytest.mark.parametrize("body", [b"[]", b"7", b'"text"', b"null"])
def test_body_that_is_no_object(body, tenant):
    answer = tenant.creator.post(f"/api/v1/batches/{tenant.batch()}/requests", body, new_key())
    assert answer.summary == (400, "VALIDATION_ERROR")


@pytest.mark.parametrize("body", [b"{", b'{"amount": NaN}', b'{"a": "\\u0000"}', b"\xff"])
def test_body_that_is_no_json(body, tenant, database):
    """There is no fingerprint of it, so nothing is kept: the key is good for the request as it was meant."""
    path = f"/api/v1/batches/{tenant.batch()}/requests"
    key = new_key()
    assert tenant.creator.post(path, body, key).summary == (400, "REQUEST_INVALID")
    assert database.records(key) == []
    assert tenant.creator.post(path, PAYMENT, key).status == 201


@pytest.mark.parametrize("method, path, status, code", [
    ("GET", "/nowhere", 404, "NOT_FOUND"),
    ("GET", "/api/v1/requests/7", 404, "NOT_FOUND"),
    ("GET", f"/api/v1/requests/{UNKNOWN}", 404, "REQUEST_NOT_FOUND"),
    ("GET", f"/api/v1/batches/{UNKNOWN}/requests", 404, "BATCH_NOT_FOUND"),
    ("POST", f"/api/v1/batches/{UNKNOWN}/requests", 404, "BATCH_NOT_FOUND"),
    ("DELETE", f"/api/v1/requests/{UNKNOWN}", 405, "METHOD_NOT_ALLOWED"),
    ("GET", f"/api/v1/requests/{UNKNOWN}/approve", 405, "METHOD_NOT_ALLOWED"),
])
def test_what_is_not_there(method, path, status, code, tenant):
    body = PAYMENT if method == "POST" else None
    assert tenant.creator.send(method, path, body, new_key()).summary == (status, code)


def test_methods_of_a_path_are_named(tenant):
    answer = tenant.creator.send("DELETE", f"/api/v1/batches/{UNKNOWN}/requests")
    assert answer.headers["Allow"] == "GET, POST"


def test_health_needs_no_login(service):
    answer = Api(service.url).get("/health")
    assert (answer.status, json.loads(answer.content)) == (200, {"status": "ok"})
