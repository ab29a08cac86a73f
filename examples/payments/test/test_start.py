"""How the service starts and stops."""

import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest
from database import Database, until
from service import Service
from tenants import ADD, APPROVE, Tenant, new_key


@pytest.fixture
def empty():
    """A database in which the service has never been."""
    database = Database()
    yield database
    database.drop()


def test_two_services_start_at_once_on_an_empty_database(empty):
    with ExitStack() as stack:
        with empty.transaction("CREATE TABLE django_migrations ()"):
            services = [stack.enter_context(closing(Service(empty))) for _ in range(2)]
            # each has seen that there is no table yet, or is kept from looking
            empty.waits(2)
        for service in services:
            service.ready()
        tenant = Tenant(services[0])
        path = ADD.path(tenant)
        key = new_key()
        with ThreadPoolExecutor(10) as clients:
            users = [tenant.user("creator1", service) for service in services] * 5
            answers = list(clients.map(lambda user: user.insist(path, ADD.body, key), users))
        assert {answer.status for answer in answers} == {201}
        assert len({answer.content for answer in answers}) == 1
        assert empty.value("SELECT count(*) FROM payments_paymentrequest") == 1


def test_extension_in_another_schema(empty):
    empty.query('DROP EXTENSION idempotency; CREATE SCHEMA "Some where"')
    empty.query('CREATE EXTENSION idempotency SCHEMA "Some where"')
    with closing(Service(empty)) as service:
        service.ready()
        tenant = Tenant(service)
        path = ADD.path(tenant)
        key = new_key()
        first, repeat = (ADD.send(tenant, path, key) for _ in range(2))
        assert (first.status, first.replayed) == (201, False)
        assert (repeat.status, repeat.replayed, repeat.content) == (201, True, first.content)
        assert empty.value('SELECT status_code FROM "Some where".idempotency_key WHERE key = %s', key) == 201


def test_database_without_the_extension(empty):
    empty.query("DROP EXTENSION idempotency")
    with closing(Service(empty)) as service:
        assert service.status() != 0
        assert "the database does not have the extension: CREATE EXTENSION idempotency" in service.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops_and_leaves_nothing(empty, number):
    with closing(Service(empty)) as service:
        service.ready()
        service.signal(number)
        assert service.status() == 0
        assert not service.is_left()
        until(lambda: empty.others() == 0, "its connections to be gone")


def test_stops_when_what_it_does_is_done(empty):
    with closing(Service(empty)) as service:
        service.ready()
        tenant = Tenant(service)
        request = tenant.pending()
        path = f"/api/v1/requests/{request}/approve"
        key = new_key()
        with empty.held(request):
            waiting = tenant.approver.begin("POST", path, APPROVE.body, key)
            empty.waits()
            service.signal(signal.SIGTERM)
            until(lambda: not service.listens(), "the service to take no more requests")
        with closing(waiting):
            assert waiting.getresponse().status == 200
        assert service.status() == 0
        assert empty.records(key) == [("APPROVE_PAYMENT_REQUEST", tenant.name, "approver1", "completed", 200)]


def test_database_that_cannot_be_reached(empty):
    with closing(Service(empty)) as service:
        service.ready()
        tenant = Tenant(service)
        path = ADD.path(tenant)
        empty.drop()
        answers = [
            tenant.creator.get("/health"),
            tenant.creator.get(path),
            tenant.creator.post("/api/v1/batches"),
            ADD.send(tenant, path, new_key()),
        ]
        assert [answer.summary for answer in answers] == [(503, "DATABASE_UNAVAILABLE")] * 4
        assert [answer.headers["Retry-After"] for answer in answers] == ["1"] * 4
