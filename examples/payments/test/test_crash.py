"""kill -9 of the service and of PostgreSQL while clients are at work: nothing is doubled, and nothing is lost."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from threading import Lock

import pytest
from database import Database, restart_server
from service import Service
from tenants import OPERATIONS, PAYMENT, id_in, new_key

CLIENTS = 6
PAYMENTS = 6
CRASHES = 3

CRASH = {
    "service": lambda service: service.restart(),
    "PostgreSQL": lambda service: restart_server(),
}


@pytest.fixture
def database():
    database = Database()
    yield database
    database.drop()


@pytest.fixture
def service(database):
    with closing(Service(database)) as service:
        yield service.ready()


def test_kill_in_the_middle_of_a_request(tenant, service, database):
    begun = [(operation, operation.path(tenant), new_key()) for operation in OPERATIONS]
    before = database.everything()
    with ExitStack() as held:
        for operation, path, key in begun:
            held.enter_context(database.held(id_in(path)))
            held.enter_context(closing(tenant.user(operation.user).begin("POST", path, operation.body, key)))
        database.waits(len(begun))
        service.kill()
    assert database.everything() == before

    service.launch()
    service.ready()
    for operation, path, key in begun:
        answer = tenant.user(operation.user).insist(path, operation.body, key)
        assert (answer.status, answer.replayed) == (operation.status, False)
        assert answer.data["status"] == operation.result
        assert tenant.shown(answer.data["id"]) == answer.data


class Load:
    """
    Clients that send requests one after the other, each until it is answered.

    answers: the body that was sent and the final answer, by user, path and key.
    disturb: is called each time that a quarter of the work is done.
    """

    def __init__(self, tenant, batch, disturb):
        self.answers = {}
        self._tenant = tenant
        self._batch = batch
        self._disturb = disturb
        self._lock = Lock()
        self._crasher = ThreadPoolExecutor(1)
        self._crashes = []

    def run(self):
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(lambda _: self._client(), range(CLIENTS)))
        for crash in self._crashes:
            crash.result()
        assert len(self._crashes) == CRASHES

    def _client(self):
        for _ in range(PAYMENTS):
            request = self._send(self._tenant.creator, f"/api/v1/batches/{self._batch}/requests", PAYMENT).data["id"]
            self._send(self._tenant.approver, f"/api/v1/requests/{request}/approve", {"comment": request})
            self._send(self._tenant.creator, f"/api/v1/requests/{request}/mark-paid", {})

    def _send(self, user, path, body):
        key = new_key()
        answer = user.insist(path, body, key)
        with self._lock:
            self.answers[user, path, key] = (body, answer)
            if len(self.answers) % (CLIENTS * PAYMENTS * 3 // (CRASHES + 1)) == 0 and len(self._crashes) < CRASHES:
                self._crashes.append(self._crasher.submit(self._disturb))
        return answer


@pytest.mark.parametrize("victim", [
    "service",
    pytest.param("PostgreSQL", marks=pytest.mark.skipif("PGDATA" not in os.environ, reason="nobody says PGDATA")),
])
def test_kill_under_load(victim, tenant, service, database):
    batch = tenant.batch()
    load = Load(tenant, batch, lambda: CRASH[victim](service))
    load.run()

    # nobody was told that something is wrong with the service
    assert tenant.creator.repeated_after | tenant.approver.repeated_after <= {409, 503}
    count = CLIENTS * PAYMENTS
    assert len(load.answers) == 3 * count
    for (user, path, key), (body, answer) in load.answers.items():
        assert answer.status == (201 if path.endswith("requests") else 200)
        repeat = user.post(path, body, key)
        assert (repeat.status, repeat.replayed, repeat.content) == (answer.status, True, answer.content)

    added = {answer.data["id"] for _, answer in load.answers.values()}
    listed = tenant.listed(batch)
    assert {data["id"] for data in listed} == added
    assert [data["number"] for data in listed] == list(range(1, count + 1))
    assert [data["status"] for data in listed] == ["PAID"] * count
    assert [[record["comment"] for record in data["approvals"]] for data in listed] == [[data["id"]] for data in listed]
    keys = [key for _, _, key in load.answers]
    stored = database.query("SELECT key FROM idempotency.idempotency_key WHERE tenant = %s", tenant.name)
    assert sorted(key for key, in stored) == sorted(keys)
