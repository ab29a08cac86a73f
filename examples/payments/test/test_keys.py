"""What is said about keys: missing, malformed, reused, in progress, and whose they are."""

import json

import pytest
from api import Api
from tenants import ADD, APPROVE, PAYMENT, Tenant, each_operation, id_in, new_key


@each_operation
@pytest.mark.parametrize("key", [None, "", "  ", '""'])
def test_missing_key(operation, key, tenant, database):
    path = operation.path(tenant)
    before = database.everything()
    answer = operation.send(tenant, path, key)
    assert answer.summary == (400, "IDEMPOTENCY_KEY_MISSING")
    assert answer.headers["Content-Type"] == "application/json"
    assert database.everything() == before


@each_operation
@pytest.mark.parametrize("key", ["two words", "caf\u00e9", "k" * 256, ["one", "two"], ["one", "one"], ["one", ""]])
def test_malformed_key(operation, key, tenant, database):
    path = operation.path(tenant)
    before = database.everything()
    assert operation.send(tenant, path, key).summary == (400, "IDEMPOTENCY_KEY_INVALID")
    assert database.everything() == before


@pytest.mark.parametrize("key", ["a", "test-123", '"test-124"', "k" * 255])
def test_good_key(key, tenant, database):
    path = ADD.path(tenant)
    assert ADD.send(tenant, path, key).status == 201
    assert ("CREATE_PAYMENT_REQUEST", tenant.name, "creator1", "completed", 201) in database.records(key.strip('"'))


@each_operation
def test_other_body(operation, tenant, database):
    path = operation.path(tenant)
    key = new_key()
    first = operation.send(tenant, path, key)
    done = database.everything()
    answer = tenant.user(operation.user).post(path, operation.other, key)
    assert answer.summary == (422, "IDEMPOTENCY_KEY_REUSED")
    assert first.data["id"] not in answer.content.decode()
    assert database.everything() == done


@each_operation
def test_other_object(operation, tenant):
    """The path belongs to the request as well: an approval of one payment request is none of another."""
    key = new_key()
    assert operation.send(tenant, operation.path(tenant), key).status == operation.status
    other = operation.path(tenant)
    assert operation.send(tenant, other, key).summary == (422, "IDEMPOTENCY_KEY_REUSED")
    assert operation.send(tenant, other, new_key()).status == operation.status


def test_same_body_written_differently(tenant):
    path = ADD.path(tenant)
    key = new_key()
    first = ADD.send(tenant, path, key)
    text = json.dumps(dict(reversed(PAYMENT.items())), indent=4).encode()
    repeat = tenant.creator.post(path, text, key)
    assert (repeat.status, repeat.replayed, repeat.content) == (201, True, first.content)


def test_amounts_that_are_one_float_are_different_requests(tenant):
    """Both are the same number for whoever reads numbers as floats."""
    bodies = [
        json.dumps(PAYMENT).replace('"1000.00"', amount).encode() for amount in ("9007199254740992", "9007199254740993")
    ]
    path = ADD.path(tenant)
    key = new_key()
    assert tenant.creator.post(path, bodies[0], key).data["amount"] == "9007199254740992.00"
    assert tenant.creator.post(path, bodies[1], key).summary == (422, "IDEMPOTENCY_KEY_REUSED")
    assert tenant.creator.post(path, bodies[1], new_key()).data["amount"] == "9007199254740993.00"


def test_same_key_of_other_user(tenant):
    """Two users of a tenant may choose the same key, and each gets an answer of its own."""
    path = ADD.path(tenant)
    key = new_key()
    first = ADD.send(tenant, path, key)
    second = tenant.user("creator2").post(path, PAYMENT, key)
    assert (second.status, second.replayed) == (201, False)
    assert (first.data["createdBy"], second.data["createdBy"]) == ("creator1", "creator2")
    assert second.data["id"] != first.data["id"]


def test_same_key_of_other_tenant(tenant, service, database):
    other = Tenant(service)
    key = new_key()
    first = ADD.send(tenant, ADD.path(tenant), key)
    second = ADD.send(other, ADD.path(other), key)
    assert (second.status, second.replayed) == (201, False)
    assert second.data["id"] != first.data["id"]
    assert sorted(database.records(key)) == sorted(
        ("CREATE_PAYMENT_REQUEST", name, "creator1", "completed", 201) for name in (tenant.name, other.name)
    )


def test_batch_with_key_is_created_once(tenant):
    key = new_key()
    first, repeat = (tenant.creator.post("/api/v1/batches", None, key) for _ in range(2))
    assert (first.status, repeat.status) == (201, 201)
    assert (first.replayed, repeat.replayed) == (False, True)
    assert repeat.content == first.content
    assert list(first.data) == ["id"]


def test_batch_without_key_is_created_each_time(tenant):
    assert tenant.batch() != tenant.batch()


@each_operation
def test_in_progress(operation, tenant, database):
    path = operation.path(tenant)
    key = new_key()
    with database.held(id_in(path)):
        waiting = tenant.user(operation.user).begin("POST", path, operation.body, key)
        database.waits()
        repeat = operation.send(tenant, path, key)
        other = tenant.user(operation.user).post(path, operation.other, key)
    assert repeat.summary == (409, "DUPLICATE_IN_PROGRESS")
    assert int(repeat.headers["Retry-After"]) == repeat.error["details"]["retryAfter"] >= 1
    assert other.summary == (422, "IDEMPOTENCY_KEY_REUSED")
    assert waiting.getresponse().status == operation.status
    waiting.close()
    assert operation.send(tenant, path, key).replayed


@each_operation
def test_client_that_hangs_up(operation, tenant, database):
    """Who did not hear the answer finds it under its key."""
    path = operation.path(tenant)
    key = new_key()
    with database.held(id_in(path)):
        client = tenant.user(operation.user).begin("POST", path, operation.body, key)
        database.waits()
        client.close()
    repeat = tenant.user(operation.user).insist(path, operation.body, key)
    assert (repeat.status, repeat.replayed) == (operation.status, True)
    assert [record[4] for record in database.records(key)] == [operation.status]


def test_stranger_gets_no_answer_of_a_key(tenant, service):
    path = APPROVE.path(tenant)
    key = new_key()
    APPROVE.send(tenant, path, key)
    assert Api(service.url).post(path, APPROVE.body, key).summary == (401, "NOT_LOGGED_IN")
