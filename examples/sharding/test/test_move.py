"""Moving a tenant: what comes along, who is refused meanwhile, and death at each step."""

import runpy
import threading
import uuid
from contextlib import ExitStack
from types import SimpleNamespace

import psycopg
import pytest

from conftest import EXAMPLE, PAYS, Tenant, call, until

STEPS = SimpleNamespace(**runpy.run_path(str(EXAMPLE / "move-tenant")))
CARD = '{"card": "tok_visa", "amount": 30}'
MOVES = "application_name = 'move-tenant'"


@pytest.fixture
def rich(proxy, tenant):
    """The tenant with something in each table: an answer, an error, leases, messages."""
    tenant.paid = proxy.pay(tenant.name, "paid", 30)
    tenant.refused = proxy.pay(tenant.name, "refused", 10_000_000)
    tenant.claim = uuid.uuid4()
    proxy.call("begin_charge", tenant.name, "leased", CARD, tenant.claim)
    proxy.call("save_charge", tenant.name, "leased", tenant.claim, "charged", '{"charge": "ch_1"}')
    stalled = uuid.uuid4()
    proxy.call("begin_charge", tenant.name, "stalled", CARD, stalled)
    tenant.shard.query("""SELECT idempotency.idempotency_checkpoint(
                              %s, 'cards.charge', 'stalled', %s, 'charged', '{"charge": "ch_2"}',
                              lease => '1 millisecond')""", tenant.name, stalled)
    charged = uuid.uuid4()
    proxy.call("begin_charge", tenant.name, "charged", CARD, charged)
    proxy.call("finish_charge", tenant.name, "charged", charged, "ch_3", 30)
    proxy.call("deposit", tenant.name, '[{"id": "m1", "amount": 5}]')
    return tenant


def rows(shard, tenant):
    """All that a shard has of a tenant, as text, but for its own row."""
    return {table: sorted(row for row, in shard.query(f"SELECT t::text FROM {table} AS t WHERE tenant = %s", tenant))
            for table in shard.counts(tenant) if table != "tenancy.tenants"}


def is_at_home(tenant, shard, proxy):
    """Whether a tenant lives there, and nothing of it is anywhere else, nor of a move."""
    return (proxy.shard_of(tenant.name) == shard.number
            and shard.serves(tenant.name)
            and all(other.counts(tenant.name) == {} for other in tenant.shards if other is not shard)
            and not proxy.query("SELECT id FROM routing.moves WHERE tenant = %s", tenant.name))


def test_everything_comes_along(proxy, shards, rich, move):
    neighbour = next(found for found in (Tenant(proxy, shards, f"neighbour-{n}-{uuid.uuid4()}") for n in range(99))
                     if found.shard is rich.shard)
    proxy.pay(neighbour.name, "k1")
    before, beside = rows(rich.shard, rich.name), rows(neighbour.shard, neighbour.name)
    assert len(before) == 5 and len(before["idempotency.idempotency_key"]) == 6

    assert move(rich.name, rich.other).ends() == f"'{rich.name}' lives on shard {rich.other.number}\n"

    assert is_at_home(rich, rich.other, proxy)
    assert rows(rich.other, rich.name) == before
    assert rows(neighbour.shard, neighbour.name) == beside

    assert proxy.pay(rich.name, "paid", 30) == rich.paid._replace(outcome="replayed")
    assert proxy.pay(rich.name, "paid", 31).outcome == "mismatched"
    assert proxy.pay(rich.name, "refused", 10_000_000) == rich.refused._replace(outcome="replayed")
    assert proxy.call("deposit", rich.name, '[{"id": "m1", "amount": 5}]').deposit == 0


def test_lease_goes_on_after_the_move(proxy, rich, move):
    move(rich.name, rich.other).ends()
    assert proxy.call("begin_charge", rich.name, "leased", CARD, uuid.uuid4()).outcome == "in_flight"
    again = proxy.call("begin_charge", rich.name, "leased", CARD, rich.claim)
    assert (again.outcome, again.attempt, again.recovery_state) == ("started", 1, {"charge": "ch_1"})
    assert proxy.call("finish_charge", rich.name, "leased", rich.claim, "ch_1", 30).finish_charge == "completed"


def test_lease_that_ran_out_is_taken_over_after_the_move(proxy, rich, move):
    move(rich.name, rich.other).ends()
    taken = proxy.call("begin_charge", rich.name, "stalled", CARD, uuid.uuid4())
    assert (taken.outcome, taken.attempt) == ("started", 2)
    assert (taken.recovery_point, taken.recovery_state) == ("charged", {"charge": "ch_2"})


def test_there_and_back(proxy, rich, move):
    before = rows(rich.shard, rich.name)
    for shard in (rich.other, rich.shard, rich.other, rich.shard):
        move(rich.name, shard).ends()
        assert is_at_home(rich, shard, proxy)
    assert rows(rich.shard, rich.name) == before


def test_repeat_of_a_move_that_is_done_does_nothing(proxy, rich, move):
    move(rich.name, rich.other).ends()
    proxy.pay(rich.name, "later")
    before = rows(rich.other, rich.name)
    move(rich.name, rich.other).ends()
    assert is_at_home(rich, rich.other, proxy)
    assert rows(rich.other, rich.name) == before


def test_null_tenant_is_the_global_one(proxy, shards, move):
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="tenant is unknown"):
        proxy.pay(None, "k1")

    tenant = Tenant(proxy, shards, "")
    proxy.query("CALL routing.create_tenant(NULL)")
    first = proxy.pay(None, "k1")
    assert first.outcome == "completed"
    assert proxy.pay("", "k1") == first._replace(outcome="replayed")

    move("", tenant.other).ends()
    assert is_at_home(tenant, tenant.other, proxy)
    assert proxy.pay(None, "k1") == first._replace(outcome="replayed")
    assert tenant.payments() == [1]


@pytest.mark.parametrize("tenant, shard, said", [
    ("nobody", 0, "there is no such tenant"), ("nobody", 3, "there is no shard 3")])
def test_impossible_moves_are_refused(proxy, move, shards, tenant, shard, said):
    class Nowhere:
        number = shard
    assert said in move(tenant, Nowhere).ends(1)


def test_request_in_flight_is_waited_for(proxy, tenant, move, threads):
    with tenant.holds_alice():
        first = threads.submit(proxy.pay, tenant.name, "k1", 30)
        tenant.shard.waits(PAYS)
        mover = move(tenant.name, tenant.other)
        tenant.shard.waits(MOVES)
        # who comes now has to wait for what the mover waits for
        later = threads.submit(proxy.pay, tenant.name, "k2", 30)
        until(lambda: len(tenant.shard.backends(f"wait_event_type = 'Lock' AND {PAYS}")) == 2, "the later one")
        assert tenant.other.counts(tenant.name) == {}
    assert first.result().outcome == "completed"
    with pytest.raises(psycopg.Error) as refused:
        later.result()
    assert refused.value.sqlstate == "SHARD"
    mover.ends()
    assert is_at_home(tenant, tenant.other, proxy)
    assert proxy.pay(tenant.name, "k1", 30) == first.result()._replace(outcome="replayed")
    assert proxy.pay(tenant.name, "k2", 30).outcome == "completed"
    assert tenant.payments() == [30, 30]


def test_prepared_transaction_is_waited_for(proxy, shards, tenant, move):
    """For who prepares transactions on a shard himself."""
    shard = tenant.shard
    shard.query("ALTER SYSTEM SET max_prepared_transactions = 5")
    shard.crash()
    shard.start()
    with shard.connect("shop_app") as connection:
        connection.execute("BEGIN")
        first = call(connection, "pay", tenant.name, "k1", '{"account": "alice", "amount": 30}')
        connection.execute("PREPARE TRANSACTION 'k1'")
    mover = move(tenant.name, tenant.other)
    shard.waits(MOVES)
    shard.query("COMMIT PREPARED 'k1'")
    mover.ends()
    again = proxy.pay(tenant.name, "k1", 30)
    assert (again.outcome, again.response) == ("replayed", first.response)
    assert tenant.payments() == [30]


def test_request_that_was_routed_before_the_move_is_refused_after_it(proxy, tenant, move):
    with proxy.connect("shop_app") as late:
        late.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with pytest.raises(psycopg.Error) as refused, late.transaction():
            late.execute("SELECT 1")   # from now on it sees the directory as it was
            proxy.pay(tenant.name, "k1", 30)
            move(tenant.name, tenant.other).ends()
            call(late, "pay", tenant.name, "k1", '{"account": "alice", "amount": 30}')
        assert refused.value.sqlstate == "SHARD"
        assert call(late, "pay", tenant.name, "k1", '{"account": "alice", "amount": 30}').outcome == "replayed"
    assert tenant.shard.counts(tenant.name) == {}
    assert tenant.payments() == [30]


#
# Death.  Each of these makes the mover wait, before or in a step.
#

def before_begin(proxy, tenant):
    return proxy, proxy.locked("LOCK TABLE routing.moves IN EXCLUSIVE MODE")


def in_close(proxy, tenant):
    return tenant.shard, tenant.shard.locked(
        "SELECT FROM tenancy.tenants WHERE tenant = %s FOR UPDATE", tenant.name)


def after_close(proxy, tenant):
    return tenant.shard, tenant.shard.locked("SELECT tenancy.lock_shared(%s)", tenant.name)


def before_copy(proxy, tenant):
    return tenant.other, tenant.other.locked("LOCK TABLE tenancy.tenants IN SHARE MODE")


def in_copy(proxy, tenant):
    return tenant.other, tenant.other.locked("LOCK TABLE idempotency.idempotency_key IN SHARE MODE")


def in_switch(proxy, tenant):
    return proxy, proxy.locked("SELECT FROM routing.directory WHERE tenant = %s FOR SHARE", tenant.name)


def in_clean(proxy, tenant):
    return tenant.shard, tenant.shard.locked("LOCK TABLE shop.accounts IN SHARE MODE")


def stopped_mover(proxy, tenant, move, step):
    """A mover that waits in a step, and what holds it there."""
    stack = ExitStack()
    database, lock = step(proxy, tenant)
    stack.enter_context(lock)
    mover = move(tenant.name, tenant.other)
    database.waits(MOVES)
    return mover, stack


@pytest.mark.parametrize("step, is_served, is_answered", [
    (before_begin, True, True),
    (in_close, True, True),
    (after_close, False, False),
    (before_copy, False, False),
    (in_copy, False, False),
    (in_switch, True, False),
    (in_clean, True, True),
])
def test_mover_that_is_killed_is_repeated(proxy, rich, move, step, is_served, is_answered):
    before = rows(rich.shard, rich.name)
    mover, stack = stopped_mover(proxy, rich, move, step)
    mover.kill()
    stack.close()
    until(lambda: not any(database.backends(MOVES) for database in (proxy, *rich.shards)),
          "the mover's connections to be gone")

    assert [shard.serves(rich.name) for shard in rich.shards].count(True) == is_served
    if is_answered:
        assert proxy.pay(rich.name, "paid", 30) == rich.paid._replace(outcome="replayed")
    else:
        with pytest.raises(psycopg.Error) as refused:
            proxy.pay(rich.name, "paid", 30)
        assert refused.value.sqlstate == "SHARD"

    move(rich.name, rich.other).ends()
    assert is_at_home(rich, rich.other, proxy)
    assert rows(rich.other, rich.name) == before
    assert proxy.pay(rich.name, "paid", 30) == rich.paid._replace(outcome="replayed")
    assert rich.payments() == [30]


def test_mover_that_is_killed_at_the_end_is_repeated(proxy, rich, move):
    """Here requests were served by the destination, and must not be lost by the repeat."""
    mover, stack = stopped_mover(proxy, rich, move, in_clean)
    later = proxy.pay(rich.name, "later", 7)
    assert later.outcome == "completed"
    with proxy.locked("SELECT FROM routing.moves WHERE tenant = %s FOR UPDATE", rich.name):
        stack.close()
        proxy.waits(MOVES)
        mover.kill()
    assert rich.shard.counts(rich.name) == {}
    assert proxy.query("SELECT id FROM routing.moves WHERE tenant = %s", rich.name)
    move(rich.name, rich.other).ends()
    assert proxy.pay(rich.name, "later", 7) == later._replace(outcome="replayed")
    assert rich.payments() == [7, 30]
    assert is_at_home(rich, rich.other, proxy)


def test_begun_move_has_to_be_finished_first(proxy, shards, rich, move):
    mover, stack = stopped_mover(proxy, rich, move, after_close)
    mover.kill()
    stack.close()
    third = shards[(rich.other.number + 1) % 3]
    assert f"a move to shard {rich.other.number} was begun" in move(rich.name, third).ends(1)
    move(rich.name, rich.other).ends()
    move(rich.name, third).ends()
    assert is_at_home(rich, third, proxy)


def test_second_mover_waits_for_the_first(proxy, shards, rich, move):
    first, stack = stopped_mover(proxy, rich, move, in_copy)
    third = shards[(rich.other.number + 1) % 3]
    second = move(rich.name, third)
    proxy.waits(f"{MOVES} AND query LIKE '%%pg_advisory_lock%%'")
    stack.close()
    first.ends()
    second.ends()
    assert is_at_home(rich, third, proxy)


def test_late_steps_of_an_old_move_do_nothing(proxy, rich, move):
    """Of a mover that has lost its connection to the proxy, and goes on after others are done."""
    before = rows(rich.shard, rich.name)
    with STEPS.connect(proxy.url) as connection:
        old = STEPS.begin(connection, rich.name, rich.other.number)
    move(rich.name, rich.other).ends()
    move(rich.name, rich.shard).ends()

    with STEPS.connect(rich.shard.url) as source, STEPS.connect(rich.other.url) as destination:
        def late_steps():
            STEPS.close(source, old)
            with pytest.raises(STEPS.Refused):
                STEPS.copy(source, destination, old)
            STEPS.clean(source, old)

        late_steps()
        assert is_at_home(rich, rich.shard, proxy)

        # and while another move, to the same shard, is under way
        mover, stack = stopped_mover(proxy, rich, move, after_close)
        mover.kill()
        stack.close()
        late_steps()
    move(rich.name, rich.other).ends()
    assert is_at_home(rich, rich.other, proxy)
    assert rows(rich.other, rich.name) == before


def test_tenant_moves_under_load(proxy, tenant, move, client, threads):
    """Nine clients, three for each key, while it is moved to and fro, by movers that are killed."""
    stop = threading.Event()
    answers = {}

    def work(number, own):
        done = 0
        while not stop.is_set():
            key = f"k{done}-{number % 3}"
            answer = own.pay(tenant.name, key)
            answers.setdefault(key, set()).add((answer.status_code, str(answer.response)))
            done += 1

    working = [threads.submit(work, number, client()) for number in range(9)]
    try:
        for number in range(6):
            shard = tenant.shards[(tenant.shard.number + number + 1) % 3]
            served = len(answers)
            until(lambda: len(answers) >= served + 10, "requests to be served")
            if number % 2:
                # somewhere in its steps
                mover = move(tenant.name, shard)
                until(lambda: mover.process.poll() is not None or proxy.query(
                    "SELECT id FROM routing.moves WHERE tenant = %s", tenant.name), "the move to begin")
                mover.kill()
            move(tenant.name, shard).ends()
    finally:
        stop.set()
    for work in working:
        work.result()

    assert is_at_home(tenant, shard, proxy)
    assert len(answers) >= 60
    assert all(len(told) == 1 for told in answers.values()), "all are told the same"
    assert tenant.payments() == [1] * len(answers)
