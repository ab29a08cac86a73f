"""What dies under a request: a backend, the shard, the proxy's backend."""

import os
import signal
import threading
import uuid

import psycopg
import pytest

from conftest import PAYS, Tenant, until


def new_tenant_on(proxy, shards, number):
    """A new tenant that was given a place on this shard."""
    while True:
        tenant = Tenant(proxy, shards, f"tenant-{uuid.uuid4()}")
        if tenant.shard.number == number:
            return tenant


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_backend_of_the_shard_is_killed(proxy, tenant, threads, how):
    """SIGKILL makes the whole shard crash, and start again by itself."""
    with tenant.holds_alice():
        first = threads.submit(proxy.pay, tenant.name, "k1")
        os.kill(tenant.shard.waits(PAYS), how)
        with pytest.raises(psycopg.Error):
            first.result()
    tenant.shard.recovered()

    assert tenant.payments() == []
    assert proxy.pay(tenant.name, "k1").outcome == "completed"
    assert tenant.payments() == [1]


def test_other_shards_go_on_while_one_is_down(proxy, shards):
    here, there = new_tenant_on(proxy, shards, 0), new_tenant_on(proxy, shards, 1)
    with proxy.connect("shop_app") as connection:
        def pay(tenant, key):
            return connection.execute("SELECT * FROM api.pay(%s, %s, %s)", [
                tenant.name, key, '{"account": "alice", "amount": 1}']).fetchone()

        first = pay(here, "k1")
        assert pay(there, "k1").outcome == "completed"
        here.shard.crash()
        try:
            with pytest.raises(psycopg.Error):
                pay(here, "k1")
            assert pay(there, "k2").outcome == "completed"
        finally:
            here.shard.start()
        assert pay(here, "k1") == first._replace(outcome="replayed")
    assert (here.payments(), there.payments()) == ([1], [1, 1])


def test_backend_of_the_proxy_is_killed(proxy, tenant, threads):
    """The shard does not notice, and commits; the repeat gets that answer."""
    with tenant.holds_alice():
        first = threads.submit(proxy.pay, tenant.name, "k1")
        tenant.shard.waits(PAYS)
        assert proxy.value("""SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                              WHERE datname = current_database() AND query LIKE '%%api.pay(%%'
                                AND pid <> pg_backend_pid()""") == 1
        with pytest.raises(psycopg.Error):
            first.result()
        assert proxy.pay(tenant.name, "k1").outcome == "in_flight"
    until(lambda: tenant.payments() == [1], "the shard to commit")
    assert proxy.pay(tenant.name, "k1").outcome == "replayed"
    assert tenant.payments() == [1]


def test_each_request_has_one_effect_while_the_shard_crashes(tenant, client, threads):
    """Twelve clients, three for each key, that repeat until they are answered."""
    rounds, keys, clients = 12, 4, 3
    answers = {}
    answered = threading.Semaphore(0)

    def work(number, own):
        for done in range(rounds):
            key = f"k{done}-{number % keys}"
            answer = own.pay(tenant.name, key)
            answers.setdefault(key, set()).add((answer.status_code, str(answer.response)))
            answered.release()

    working = [threads.submit(work, number, client()) for number in range(keys * clients)]
    for _ in range(3):
        # between two crashes, something is done
        for _ in range(keys * clients * 2):
            assert answered.acquire(timeout=60)
        tenant.shard.crash()
        tenant.shard.start()
    for work in working:
        work.result()

    assert len(answers) == rounds * keys
    assert all(len(told) == 1 for told in answers.values()), "all are told the same"
    assert tenant.payments() == [1] * (rounds * keys)
