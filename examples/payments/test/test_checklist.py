"""
The checklist for idempotency keys that a payment service must pass, line by line, and its three tests.

That a view which passes no key is found out is shown in test_hand_over.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from tenants import ADD, APPROVE, MARK_PAID, OPERATIONS, PAYMENT, REJECT, each_operation, new_key


def assert_view_passes_key(operation, tenant, database):
    """The key of the header is that of the record, which is written when the service has finished."""
    path = operation.path(tenant)
    key = new_key()
    answer = operation.send(tenant, path, key)
    assert (answer.status, answer.data["status"]) == (operation.status, operation.result)
    assert database.records(key) == [
        (operation.action, tenant.name, operation.user, "completed", operation.status),
    ]


def assert_service_checks_key(operation, tenant, database):
    """A repeat changes nothing, and neither does something else under the same key."""
    path = operation.path(tenant)
    key = new_key()
    operation.send(tenant, path, key)
    done = database.everything()

    assert operation.send(tenant, path, key).status == operation.status
    answer = tenant.user(operation.user).post(path, operation.other, key)
    assert answer.summary == (422, "IDEMPOTENCY_KEY_REUSED")
    assert database.everything() == done


def test_add_request_view_passes_idempotency_key_to_service(tenant, database):
    assert_view_passes_key(ADD, tenant, database)


def test_approve_request_service_accepts_and_checks_idempotency_key(tenant, database):
    assert_service_checks_key(APPROVE, tenant, database)


def test_approve_request_view_passes_idempotency_key_to_service(tenant, database):
    assert_view_passes_key(APPROVE, tenant, database)


def test_reject_request_service_accepts_and_checks_idempotency_key(tenant, database):
    assert_service_checks_key(REJECT, tenant, database)


def test_reject_request_view_passes_idempotency_key_to_service(tenant, database):
    assert_view_passes_key(REJECT, tenant, database)


def test_mark_paid_service_accepts_and_checks_idempotency_key(tenant, database):
    assert_service_checks_key(MARK_PAID, tenant, database)


def test_mark_paid_view_passes_idempotency_key_to_service(tenant, database):
    assert_view_passes_key(MARK_PAID, tenant, database)


def test_all_services_store_idempotency_keys(tenant, database):
    key = new_key()
    for operation in OPERATIONS:
        operation.send(tenant, operation.path(tenant), key)
    assert database.records(key) == [
        ("APPROVE_PAYMENT_REQUEST", tenant.name, "approver1", "completed", 200),
        ("CREATE_PAYMENT_REQUEST", tenant.name, "creator1", "completed", 201),
        ("MARK_PAYMENT_PAID", tenant.name, "creator1", "completed", 200),
        ("REJECT_PAYMENT_REQUEST", tenant.name, "approver1", "completed", 200),
    ]


@each_operation
def test_all_services_return_original_object_if_key_exists(operation, tenant, database):
    path = operation.path(tenant)
    key = new_key()
    first = operation.send(tenant, path, key)
    database.query("UPDATE payments_paymentrequest SET purpose = 'changed since' WHERE id = %s", first.data["id"])
    repeat = operation.send(tenant, path, key)

    assert (first.status, first.replayed) == (operation.status, False)
    assert (repeat.status, repeat.replayed) == (operation.status, True)
    assert repeat.content == first.content
    assert repeat.headers["Content-Type"] == first.headers["Content-Type"] == "application/json"


def test_duplicate_request(tenant):
    batch = tenant.batch()
    key = new_key()
    first, second = (tenant.creator.post(f"/api/v1/batches/{batch}/requests", PAYMENT, key) for _ in range(2))

    assert (first.status, second.status) == (201, 201)
    assert second.data == first.data
    assert tenant.listed(batch) == [first.data]


def test_duplicate_approval(tenant, database):
    request = tenant.pending()
    key = new_key()
    path = f"/api/v1/requests/{request}/approve"
    first, second = (tenant.approver.post(path, {"comment": "Approved"}, key) for _ in range(2))

    assert (first.status, second.status) == (200, 200)
    assert (first.data["id"], first.data["status"]) == (request, "APPROVED")
    assert second.data == first.data
    assert database.query(
        "SELECT decision, approver, comment FROM payments_approvalrecord WHERE payment_request_id = %s", request
    ) == [("APPROVED", "approver1", "Approved")]


def test_idempotency_rows_in_database(tenant, database):
    """One row for each key and operation, with the code of the response, however often a request came."""
    keys = [new_key(), new_key()]
    rows = {}
    for operation in OPERATIONS:
        for key in keys:
            path = operation.path(tenant)
            for _ in range(3):
                operation.send(tenant, path, key)
            rows[key, operation.action] = operation.status
    refused = new_key()
    answer = tenant.approver.post(f"/api/v1/requests/{tenant.approved()}/approve", {}, refused)
    assert answer.summary == (422, "INVALID_STATUS")
    rows[refused, "APPROVE_PAYMENT_REQUEST"] = 422

    stored = database.query(
        "SELECT key, action, status_code FROM idempotency.idempotency_key"
        " WHERE tenant = %s AND key = ANY (%s)",
        tenant.name,
        [*keys, refused],
    )
    assert sorted(stored) == sorted((key, action, status) for (key, action), status in rows.items())


def test_concurrent_approval(tenant, database):
    """Ten at once, while the first is at work."""
    request = tenant.pending()
    path = f"/api/v1/requests/{request}/approve"
    key = new_key()
    with ThreadPoolExecutor(10) as clients:
        with database.held(request):
            first = clients.submit(tenant.approver.post, path, {"comment": "Approved"}, key)
            database.waits()
            others = list(clients.map(lambda _: tenant.approver.post(path, {"comment": "Approved"}, key), range(9)))
        first = first.result()
    assert [answer.summary for answer in others] == [(409, "DUPLICATE_IN_PROGRESS")] * 9
    assert [int(answer.headers["Retry-After"]) > 0 for answer in others] == [True] * 9
    assert first.status == 200
    assert len(tenant.shown(request)["approvals"]) == 1
    repeat = tenant.approver.post(path, {"comment": "Approved"}, key)
    assert (repeat.replayed, repeat.content) == (True, first.content)


def test_concurrent_approval_by_clients_that_repeat(tenant):
    request = tenant.pending()
    path = f"/api/v1/requests/{request}/approve"
    key = new_key()
    with ThreadPoolExecutor(10) as clients:
        answers = list(clients.map(lambda _: tenant.approver.insist(path, {"comment": "Approved"}, key), range(10)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert [answer.replayed for answer in answers].count(False) == 1
    assert [record["comment"] for record in tenant.shown(request)["approvals"]] == ["Approved"]


@pytest.mark.parametrize("verb", ["approve", "reject"])
def test_concurrent_approval_with_ten_keys(verb, tenant, database):
    """Here the lock of the row decides, not the key: nine find a request that is approved already."""
    request = tenant.pending()
    with ThreadPoolExecutor(10) as clients:
        with database.held(request):
            decided = [
                clients.submit(
                    tenant.user(f"approver{number}").post,
                    f"/api/v1/requests/{request}/{verb if number % 2 else 'approve'}",
                    {"comment": str(number)},
                    new_key(),
                )
                for number in range(10)
            ]
            database.waits(10)
        answers = [decision.result() for decision in decided]
    assert sorted(answer.status for answer in answers) == [200] + [422] * 9
    (winner,) = (answer for answer in answers if answer.status == 200)
    assert tenant.shown(request) == winner.data
    assert len(winner.data["approvals"]) == 1
    assert {answer.summary for answer in answers if answer.status == 422} == {(422, "INVALID_STATUS")}
