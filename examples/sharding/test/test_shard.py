"""A shard by itself: whom it takes requests of, and what the application may do there."""

import uuid

import psycopg
import pytest

from conftest import call

PAYMENT = '{"account": "alice", "amount": 30}'
APPLICATION_CALLS = ("pay", "refund", "status", "begin_charge", "save_charge", "finish_charge", "deposit")


@pytest.fixture
def shard(shards):
    return shards[0]


@pytest.fixture
def resident(shard):
    """A tenant that lives there."""
    name = f"resident-{uuid.uuid4()}"
    shard.query("SELECT tenancy.add_tenant(%s)", name)
    shard.query("INSERT INTO shop.accounts VALUES (%s, 'alice', 100)", name)
    return name


@pytest.fixture
def application(shard):
    with shard.connect("shop_app") as connection:
        yield connection


def test_takes_requests_of_a_tenant_that_lives_there(application, resident):
    first = call(application, "pay", resident, "k1", PAYMENT)
    assert (first.outcome, first.status_code) == ("completed", 201)
    again = call(application, "pay", resident, "k1", PAYMENT)
    assert (again.outcome, again.response) == ("replayed", first.response)


def calls_for(tenant):
    claim = uuid.uuid4()
    return {
        "pay": (tenant, "k1", PAYMENT),
        "refund": (tenant, "k1", f'{{"payment": "{claim}"}}'),
        "status": (tenant, "payments.create", "k1"),
        "begin_charge": (tenant, "k1", PAYMENT, claim),
        "save_charge": (tenant, "k1", claim, "charged", "{}"),
        "finish_charge": (tenant, "k1", claim, "ch_1", 30),
        "deposit": (tenant, '[{"id": "m1", "amount": 30}]'),
    }


@pytest.mark.parametrize("function", APPLICATION_CALLS)
@pytest.mark.parametrize("why", ["never lived there", "is leaving"])
def test_refuses_others(shard, application, resident, function, why):
    tenant = resident
    if why == "is leaving":
        shard.query("UPDATE tenancy.tenants SET leaving_by = gen_random_uuid() WHERE tenant = %s", tenant)
    else:
        tenant += " junior"
    before = shard.counts(tenant)

    with pytest.raises(psycopg.Error) as refused:
        call(application, function, *calls_for(tenant)[function])
    assert refused.value.sqlstate == "SHARD"
    assert shard.counts(tenant) == before


def test_every_call_is_tried(shard):
    assert sorted(APPLICATION_CALLS) == [name for name, in shard.query(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'api'::regnamespace ORDER BY 1")]


def test_tenant_is_left_when_the_last_request_has_ended(shard, application, resident, threads):
    """What move-tenant does to close a shard, against a request at work and one that comes later."""
    def come():
        with shard.connect("shop_app") as connection:
            call(connection, "pay", resident, "late", PAYMENT)

    with shard.connect("shop_app") as at_work, at_work.transaction():
        call(at_work, "pay", resident, "k1", PAYMENT)
        shard.query("UPDATE tenancy.tenants SET leaving_by = gen_random_uuid() WHERE tenant = %s", resident)
        left = threads.submit(shard.query, "SELECT tenancy.lock_alone(%s)", resident)
        shard.waits("query LIKE '%%lock_alone%%'")
        late = threads.submit(come)
        shard.waits("query LIKE '%%api.pay(%%'")
        assert not left.done()
    left.result()
    with pytest.raises(psycopg.Error) as refused:
        late.result()
    assert refused.value.sqlstate == "SHARD"
    assert shard.counts(resident)["shop.payments"] == 1


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_refuses_transactions_that_may_not_see_a_move(shard, application, resident, level):
    with pytest.raises(psycopg.errors.FeatureNotSupported):
        with application.transaction():
            application.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
            call(application, "pay", resident, "k1", PAYMENT)
    assert "shop.payments" not in shard.counts(resident)


def test_every_table_of_tenants_moves_with_them(shard):
    """move-tenant finds them by their foreign key."""
    assert shard.query("""
        SELECT attrelid::regclass FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        WHERE attname = 'tenant' AND relkind = 'r' AND relnamespace = 'shop'::regnamespace
          AND NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = attrelid AND contype = 'f'
                          AND confrelid = 'tenancy.tenants'::regclass)""") == []


@pytest.mark.parametrize("statement", [
    "SELECT * FROM tenancy.tenants",
    "SELECT tenancy.enter('acme')",
    "SELECT tenancy.add_tenant('acme')",
    "SELECT tenancy.lock_alone('acme')",
    "SELECT * FROM shop.payments",
    "SELECT shop.pay('{}')",
    "SELECT * FROM idempotency.idempotency_key",
    "SELECT * FROM idempotency.idempotency_replay('acme', 'payments.create', 'k1')",
])
def test_application_may_do_nothing_else(application, statement):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        application.execute(statement)
