"""Requests through the proxy: where they go, and what they are told."""

import json
import uuid

import psycopg
import pytest

from conftest import PAYS, Tenant, call

CARD = '{"card": "tok_visa", "amount": 30}'


def sqlstate_of(function, *arguments):
    with pytest.raises(psycopg.Error) as raised:
        function(*arguments)
    return raised.value.sqlstate


def test_tenants_are_spread_over_the_shards(proxy, shards):
    tenants = [Tenant(proxy, shards, f"spread-{number}") for number in range(12)]
    for tenant in tenants:
        assert proxy.pay(tenant.name, "k1").outcome == "completed"

    assert {tenant.shard.number for tenant in tenants} == {0, 1, 2}
    for tenant in tenants:
        assert tenant.shard.serves(tenant.name)
        assert tenant.shard.counts(tenant.name) == {
            "tenancy.tenants": 1, "shop.accounts": 1, "shop.payments": 1, "idempotency.idempotency_key": 1}
        assert all(shard.counts(tenant.name) == {} for shard in shards if shard is not tenant.shard)


def test_tenant_may_be_created_again(proxy, tenant):
    proxy.query("CALL routing.create_tenant(%s)", tenant.name)
    assert [shard.serves(tenant.name) for shard in tenant.shards].count(True) == 1


def test_unknown_tenant_is_asked_for_nowhere(proxy, shards):
    assert sqlstate_of(proxy.pay, "nobody", "k1") == "22023"


def test_wrong_shard_refuses(proxy, tenant):
    """Whatever the directory says."""
    assert proxy.pay(tenant.name, "k1").outcome == "completed"
    proxy.query("UPDATE routing.directory SET shard = %s WHERE tenant = %s", tenant.other.number, tenant.name)
    assert sqlstate_of(proxy.pay, tenant.name, "k1") == "SHARD"
    assert sqlstate_of(proxy.pay, tenant.name, "k2") == "SHARD"
    assert tenant.other.counts(tenant.name) == {}
    assert tenant.payments() == [1]


def test_duplicate_gets_the_same_bytes(proxy, tenant):
    def answer(connection):
        return connection.execute(
            """SELECT outcome, status_code, convert_to(response::text, 'UTF8')
               FROM api.pay(%s, 'k1', '{"account": "alice", "amount": 30}')""", [tenant.name]).fetchone()

    with proxy.connect("shop_app") as connection:
        outcome, status, body = answer(connection)
        assert (outcome, status) == ("completed", 201)
        assert b'"amount" : 30}' in body, "json as the handler has written it"
        assert answer(connection) == ("replayed", 201, body)
    with proxy.connect("shop_app") as connection:
        assert answer(connection) == ("replayed", 201, body)
    assert tenant.payments() == [30]


def test_final_error_is_kept(proxy, tenant):
    first = proxy.pay(tenant.name, "k1", 10_000_000)
    assert (first.outcome, first.status_code) == ("errored", 402)
    assert proxy.pay(tenant.name, "k1", 10_000_000) == first._replace(outcome="replayed")
    assert tenant.payments() == []


def test_error_leaves_nothing_and_a_repeat_runs(proxy, tenant):
    tenant.shard.query("ALTER TABLE shop.payments ADD CONSTRAINT broken CHECK (amount <> 666)")
    try:
        assert sqlstate_of(proxy.pay, tenant.name, "k1", 666) == "23514"
        assert "idempotency.idempotency_key" not in tenant.shard.counts(tenant.name)
    finally:
        tenant.shard.query("ALTER TABLE shop.payments DROP CONSTRAINT broken")
    assert proxy.pay(tenant.name, "k1", 666).outcome == "completed"
    assert tenant.payments() == [666]


class Caller:
    """A connection to the proxy, and the backend of the shard that it is connected to."""

    def __init__(self, connection, tenant):
        self.connection = connection
        self.tenant = tenant
        tenant.shard.query("""CREATE OR REPLACE FUNCTION api.backend(tenant text) RETURNS int
                              LANGUAGE sql AS 'SELECT pg_backend_pid()'""")

    def backend(self):
        return self.connection.execute("SELECT api.backend(%s)", [self.tenant.name]).fetchone()[0]


@pytest.fixture
def caller(proxy, tenant):
    proxy.query("""CREATE OR REPLACE FUNCTION api.backend(tenant text) RETURNS int LANGUAGE plproxy
                   AS 'CLUSTER ''shards''; RUN ON routing.shard_of(tenant);'""")
    with proxy.connect("shop_app") as connection:
        yield Caller(connection, tenant)
    proxy.query("DROP FUNCTION api.backend")
    tenant.shard.query("DROP FUNCTION api.backend")


def test_mismatch_is_an_outcome_and_keeps_the_connection(proxy, tenant, caller):
    assert proxy.pay(tenant.name, "k1", 30).outcome == "completed"
    backend = caller.backend()
    told = call(caller.connection, "pay", tenant.name, "k1", '{"account": "alice", "amount": 31}')
    assert (told.outcome, told.status_code, told.response) == ("mismatched", None, None)
    assert caller.backend() == backend
    assert tenant.payments() == [30]


def test_mismatch_keeps_its_sqlstate_but_not_the_connection(proxy, tenant, caller):
    payment = proxy.pay(tenant.name, "k1", 30).response["payment"]
    first = proxy.call("refund", tenant.name, "r1", f'{{"payment": "{payment}"}}')
    assert (first.outcome, first.status_code, first.response) == ("completed", 200, {"refunded": 30})
    assert proxy.call("refund", tenant.name, "r1", f'{{"payment": "{payment}"}}') == first._replace(
        outcome="replayed")

    backend = caller.backend()
    assert sqlstate_of(call, caller.connection, "refund", tenant.name, "r1", '{"payment": null}') == "ID004"
    assert caller.backend() != backend


@pytest.mark.parametrize("key, sqlstate", [(None, "ID001"), ("", "ID001"), ("with\ttab", "ID002")])
def test_key_is_checked(proxy, tenant, key, sqlstate):
    assert sqlstate_of(proxy.pay, tenant.name, key) == sqlstate


def test_request_in_flight(proxy, tenant, threads):
    with tenant.holds_alice():
        first = threads.submit(proxy.pay, tenant.name, "k1", 30)
        tenant.shard.waits(PAYS)
        told = proxy.pay(tenant.name, "k1", 30)
        assert (told.outcome, told.status_code) == ("in_flight", None)
        assert told.retry_after >= 1
        assert proxy.pay(tenant.name, "k1", 31).outcome == "mismatched"
        assert proxy.call("status", tenant.name, "payments.create", "k1").outcome == "in_flight"
    assert first.result().outcome == "completed"
    assert proxy.pay(tenant.name, "k1", 30) == first.result()._replace(outcome="replayed")
    assert tenant.payments() == [30]


def test_request_in_flight_keeps_its_sqlstate(proxy, tenant, threads):
    payment = proxy.pay(tenant.name, "k1", 30).response["payment"]
    refund = ("refund", tenant.name, "r1", f'{{"payment": "{payment}"}}')
    with tenant.holds_alice():
        first = threads.submit(proxy.call, *refund)
        tenant.shard.waits("query LIKE '%%api.refund(%%'")
        assert sqlstate_of(proxy.call, *refund) == "ID003"
    assert first.result().outcome == "completed"


def test_status(proxy, tenant):
    assert proxy.call("status", tenant.name, "payments.create", "k1").outcome is None
    first = proxy.pay(tenant.name, "k1", 30)
    assert proxy.call("status", tenant.name, "payments.create", "k1") == first._replace(outcome="replayed")


def test_rollback_on_the_proxy_undoes_nothing_on_the_shard(proxy, tenant):
    with proxy.connect("shop_app") as connection:
        with connection.transaction(force_rollback=True):
            first = call(connection, "pay", tenant.name, "k1", '{"account": "alice", "amount": 30}')
            assert first.outcome == "completed"
    assert tenant.payments() == [30]
    assert proxy.pay(tenant.name, "k1", 30) == first._replace(outcome="replayed")
    assert tenant.payments() == [30]


def test_leased_claim_over_separate_calls(proxy, tenant):
    claim, another = uuid.uuid4(), uuid.uuid4()

    begun = proxy.call("begin_charge", tenant.name, "c1", CARD, claim)
    assert (begun.outcome, begun.attempt) == ("started", 1)
    assert proxy.call("begin_charge", tenant.name, "c1", CARD, claim).outcome == "started", "asked again"
    assert proxy.call("begin_charge", tenant.name, "c1", CARD, another).outcome == "in_flight"

    proxy.call("save_charge", tenant.name, "c1", claim, "charged", '{"charge": "ch_1"}')
    assert sqlstate_of(proxy.call, "save_charge", tenant.name, "c1", another, "charged", None) == "ID005"
    for _ in range(2):
        assert proxy.call("finish_charge", tenant.name, "c1", claim, "ch_1", 30).finish_charge == "completed"

    told = proxy.call("begin_charge", tenant.name, "c1", CARD, another)
    assert (told.outcome, told.status_code, told.response) == ("replayed", 201, {"charge": "ch_1"})
    assert tenant.shard.counts(tenant.name)["shop.charges"] == 1


def test_finish_with_a_lost_claim_records_nothing(proxy, tenant):
    proxy.call("begin_charge", tenant.name, "c1", CARD, uuid.uuid4())
    assert sqlstate_of(proxy.call, "finish_charge", tenant.name, "c1", uuid.uuid4(), "ch_1", 30) == "ID005"
    assert "shop.charges" not in tenant.shard.counts(tenant.name)


def test_messages_are_deposited_once(proxy, tenant):
    def deposit(**amounts):
        messages = [{"id": message_id, "amount": amount} for message_id, amount in amounts.items()]
        return proxy.call("deposit", tenant.name, json.dumps(messages + messages[-1:])).deposit

    assert deposit(m1=10, m2=20) == 2
    assert deposit(m2=20, m3=30) == 1
    assert deposit(m1=10, m2=20, m3=30) == 0
    assert sorted(tenant.shard.query("SELECT message_id, amount FROM shop.deposits WHERE tenant = %s",
                                     tenant.name)) == [("m1", 10), ("m2", 20), ("m3", 30)]


def test_tenant_in_the_request_does_not_count(proxy, shards, tenant):
    victim = next(found for found in (Tenant(proxy, shards, f"victim-{uuid.uuid4()}") for _ in range(99))
                  if found.shard is tenant.shard)
    request = json.dumps({"account": "alice", "amount": 1, "tenant": victim.name})
    assert proxy.call("pay", tenant.name, "k1", request).outcome == "completed"
    assert (tenant.payments(), victim.payments()) == ([1], [])


@pytest.mark.parametrize("statement", [
    "SELECT * FROM routing.directory",
    "SELECT * FROM routing.moves",
    "SELECT routing.add_to_shard('acme')",
    "CALL routing.create_tenant('acme')",
])
def test_application_may_do_nothing_but_call(proxy, statement):
    with proxy.connect("shop_app") as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement)
