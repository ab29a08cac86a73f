"""Workers that die, hang, lose their connection or are stopped, at each step.

The steps are the work, COMMIT, and the acknowledgement.  A worker waits in its work
for the account of a message, and in its acknowledgement for the delivery, when a test
has locked these.
"""

import signal

import pytest

from conftest import until

BOB = "SELECT FROM accounts WHERE name = 'bob' FOR UPDATE"
DELIVERIES = "SELECT FROM queue.deliveries FOR UPDATE"


def worker_at_work(database, start, *messages, **options):
    """A worker whose work waits for bob's account, and the lock it waits for."""
    database.publish(*messages)
    lock = database.lock(BOB)
    worker = start(**options)
    worker.waits("ledger")
    return worker, lock


def worker_at_acknowledgement(database, start):
    """A worker that has committed m1, and waits to acknowledge it; and what for."""
    worker, account = worker_at_work(database, start, ("m1", "bob", 1))
    lock = database.lock(DELIVERIES)
    account.release()
    worker.waits("DELETE FROM queue.deliveries")
    assert database.effects() == ["m1"]
    return worker, lock


def test_kill_before_commit(database, start):
    worker, lock = worker_at_work(database, start, ("m1", "alice", 1), ("m2", "bob", 1))
    worker.kill()
    lock.release()
    until(lambda: not worker.backends(), "the server to notice")
    assert (database.effects(), database.seen(), database.left()) == ([], [], 2)

    database.pass_time()
    start()
    database.drained()
    assert database.effects() == ["m1", "m2"]


def test_kill_between_commit_and_acknowledgement(database, start):
    worker, lock = worker_at_acknowledgement(database, start)
    worker.vanish()
    lock.release()
    assert (database.effects(), database.seen(), database.left()) == (["m1"], ["m1"], 1)

    database.pass_time()
    start()
    database.drained()
    assert database.effects() == ["m1"]


def test_kill_during_the_acknowledgement(database, start):
    """The server may acknowledge although nobody is there to hear of it."""
    worker, lock = worker_at_acknowledgement(database, start)
    worker.kill()
    lock.release()
    database.drained()
    assert database.effects() == ["m1"]


def test_message_that_kills_its_worker(database, start):
    """It comes alone after its first time, and its neighbours are not killed again."""
    messages = [("m1", "alice", 1), ("killer", "bob", 1), ("m2", "alice", 1)]
    worker, lock = worker_at_work(database, start, *messages, attempts=3)
    worker.vanish()
    for _ in range(2):
        database.pass_time()
        worker = start(attempts=3)
        worker.waits("ledger")
        worker.vanish()
    database.pass_time()
    start(attempts=3)
    database.drained()
    lock.release()
    assert database.effects() == ["m1", "m2"]
    assert database.dead_letters() == [("killer", 3, None)]


@pytest.mark.parametrize("step", [worker_at_work, worker_at_acknowledgement])
def test_lost_connection(database, start, step):
    if step is worker_at_work:
        worker, lock = step(database, start, ("m1", "bob", 1))
    else:
        worker, lock = step(database, start)
    worker.terminate_backend()
    lock.release()
    until(worker.backends, "the worker to connect again")
    assert database.left() == 1

    database.pass_time()
    database.drained()
    assert database.effects() == ["m1"]
    assert worker.process.poll() is None


def test_lost_connection_of_an_idle_worker(database, start):
    worker = start()
    worker.asks()
    worker.terminate_backend()
    database.publish(("m1", "alice", 1))
    database.drained()
    assert database.effects() == ["m1"]
    assert worker.process.poll() is None


def test_worker_that_hangs_in_its_transaction(database, start):
    """The server ends its transaction after the time for which a delivery is invisible."""
    worker, lock = worker_at_work(database, start, ("m1", "bob", 1), visibility=1)
    worker.process.send_signal(signal.SIGSTOP)
    lock.release()
    start(visibility=1)
    database.drained()
    assert database.effects() == ["m1"]

    worker.process.send_signal(signal.SIGCONT)
    worker.asks()
    assert database.effects() == ["m1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_the_worker_finish_its_batch(database, start, number):
    messages = [("m1", "bob", 1), ("m2", "bob", 2), ("m3", "alice", 3)]
    worker, lock = worker_at_work(database, start, *messages, batch=2)
    worker.process.send_signal(number)
    lock.release()
    assert worker.process.wait(timeout=60) == 0
    assert (database.effects(), database.left()) == (["m1", "m2"], 1)


def test_signal_stops_an_idle_worker(start):
    worker = start()
    worker.asks()
    assert worker.stop(signal.SIGTERM) == 0
