"""Messages that come again, and messages that fail.

Whatever the queue delivers, how often and in which batches, each message has its
effect once; one that cannot have it ends among the dead letters, and takes no other
with it.
"""

import psycopg
import pytest

from conftest import until


def test_duplicates_within_a_batch(database, start):
    database.publish(("m1", "alice", 1), ("m2", "bob", 2), ("m1", "alice", 1), ("m1", "alice", 1))
    start()
    database.drained()
    assert database.effects() == ["m1", "m2"]
    assert database.value("SELECT count(DISTINCT posted_at) FROM ledger") == 1, "one batch"


def test_delivery_after_the_acknowledgement(database, start):
    database.publish(("m1", "alice", 1))
    start()
    database.drained()
    assert database.effects() == ["m1"]
    database.publish(("m1", "alice", 1), ("m2", "alice", 1))
    database.drained()
    assert database.effects() == ["m1", "m2"]


def test_two_consumers_see_each_message_once(database, start):
    database.query("""INSERT INTO queue.deliveries (consumer, message_id, payload)
                      SELECT name, message_id, '{"order": "77", "account": "bob", "amount": 1}'
                        FROM queue.consumers, unnest('{m1,m2,m1}'::text[]) AS message_id""")
    start("accounting")
    start("shipping")
    database.drained()
    assert database.effects() == ["m1", "m2"]
    assert database.query("SELECT message_id FROM parcels ORDER BY message_id") == [
        ("m1",), ("m2",)]


def test_id_is_remembered_for_as_long_as_was_asked(database, start):
    database.publish(("m1", "alice", 1))
    start()
    database.drained()
    assert database.query("SELECT expires_at - created_at = '72 h' FROM idempotency.idempotency_key"
                          ) == [(True,)]
    # a delivery that comes later than that is that of a new message
    database.query("UPDATE idempotency.idempotency_key SET expires_at = now()")
    database.publish(("m1", "alice", 1))
    database.drained()
    assert database.effects() == ["m1", "m1"]


@pytest.mark.parametrize("payload, reason", [
    ({"account": "alice", "amount": -5}, "CheckViolation"),
    ({"account": "alice"}, "KeyError"),
    (None, "TypeError")])
def test_poison_alone_becomes_a_dead_letter(database, start, payload, reason):
    database.deliver([("poison", payload)])
    start(attempts=3)
    until(database.dead_letters, "the dead letter")
    [(message_id, attempts, said)] = database.dead_letters()
    assert (message_id, attempts) == ("poison", 3)
    assert said.startswith(reason)
    assert (database.left(), database.effects(), database.seen()) == (0, [], [])


def test_poison_does_not_take_its_neighbours_with_it(database, start):
    database.publish(("m1", "alice", 1), ("poison", "alice", -5), ("m2", "bob", 2),
                     ("poison", "alice", -5), ("m1", "alice", 1))
    start(attempts=2)
    database.drained()
    assert database.effects() == ["m1", "m2"]
    assert database.value("SELECT count(DISTINCT posted_at) FROM ledger") == 1, "one batch"
    assert [dead[:2] for dead in database.dead_letters()] == [("poison", 2), ("poison", 2)]


def test_message_that_works_at_a_later_delivery_has_its_effect_once(database, start):
    database.publish(("m1", "alice", 1), ("early", "carol", 1), ("m2", "alice", 1))
    start(attempts=100000)
    until(lambda: database.value("SELECT max(attempts) >= 3 FROM queue.deliveries"),
          "the third attempt")
    assert database.effects() == ["m1", "m2"]
    database.query("INSERT INTO accounts VALUES ('carol')")
    database.drained()
    assert database.effects() == ["early", "m1", "m2"]
    database.publish(("early", "carol", 1))
    database.drained()
    assert database.effects() == ["early", "m1", "m2"]
    assert database.dead_letters() == []


def test_message_that_fails_keeps_no_other_waiting(database, start):
    database.publish(*[(f"poison{number}", "alice", -5) for number in range(3)])
    start(attempts=100000)
    until(lambda: "CheckViolation" in database.reason("poison2"), "the messages to fail")
    database.publish(("m1", "alice", 1))
    until(lambda: database.effects() == ["m1"], "the other one to be done")


def test_other_messages_keep_one_that_failed_not_waiting(database, start):
    lock = database.lock("SELECT FROM accounts WHERE name = 'bob' FOR UPDATE")
    database.publish(("early", "carol", 1), ("m1", "bob", 1),
                     ("m2", "alice", 1), ("m3", "alice", 1))
    start(attempts=100000, batch=1).waits("ledger")
    lock.release("INSERT INTO accounts VALUES ('carol')")
    database.drained()
    assert [message_id for message_id, in
            database.query("SELECT message_id FROM ledger ORDER BY posted_at")] == [
                "m1", "early", "m2", "m3"]


def test_dead_letter_is_delivered_again_by_hand(database, start):
    database.publish(("early", "carol", 1))
    start(attempts=1)
    until(database.dead_letters, "the dead letter")
    database.query("INSERT INTO accounts VALUES ('carol')")
    database.query("""WITH again AS (DELETE FROM queue.dead_letters RETURNING *)
                      INSERT INTO queue.deliveries (consumer, message_id, payload)
                      SELECT consumer, message_id, payload FROM again""")
    database.drained()
    assert (database.effects(), database.dead_letters()) == (["early"], [])


def test_message_that_failed_comes_again_after_the_delay(database, start):
    database.publish(("poison", "alice", -5))
    start(visibility=60, delay=3600)
    until(lambda: "CheckViolation" in database.reason("poison"), "the message to fail")
    assert database.value("SELECT visible_at > now() + '30 min' FROM queue.deliveries")


def test_delivery_that_somebody_is_taking_is_passed_by(database, start):
    database.publish(("m1", "alice", 1), ("m2", "alice", 1))
    lock = database.lock("SELECT FROM queue.deliveries WHERE message_id = 'm1' FOR UPDATE")
    start()
    until(lambda: database.left() == 1, "the other one to be done")
    assert database.effects() == ["m2"]
    lock.release()
    database.drained()
    assert database.effects() == ["m1", "m2"]


def test_message_that_somebody_else_is_forgetting(database, start):
    """ID003 fails the batch, until the administrator has made up his mind."""
    lock = database.lock("SELECT idempotency.idempotency_forget(NULL, 'accounting', 'early')")
    database.publish(("m1", "alice", 1), ("early", "carol", 1), ("m2", "alice", 1))
    start(attempts=100000)
    until(lambda: database.effects() == ["m1", "m2"], "the others to be done")
    until(lambda: "in flight" in database.reason("early"), "the message to fail alone")
    lock.release()
    until(lambda: "ForeignKey" in database.reason("early"), "the message to fail by itself")
    database.query("INSERT INTO accounts VALUES ('carol')")
    database.drained()
    assert database.effects() == ["early", "m1", "m2"]


def test_malformed_id_fails_nothing_but_itself(database, start):
    database.publish(("m1", "alice", 1), ("m 2", "alice", 1), ("m3", "alice", 1))
    start(attempts=2)
    database.drained()
    assert database.effects() == ["m1", "m3"]
    [(message_id, attempts, reason)] = database.dead_letters()
    assert (message_id, attempts) == ("m 2", 2)
    assert "malformed" in reason


def test_message_that_fails_at_commit_fails_nothing_but_itself(database, start):
    database.query("ALTER TABLE ledger ALTER CONSTRAINT ledger_account_fkey"
                   " DEFERRABLE INITIALLY DEFERRED")
    database.publish(("m1", "alice", 1), ("poison", "carol", 1), ("m2", "alice", 1))
    start(attempts=3)
    database.drained()
    assert database.effects() == ["m1", "m2"]
    [(message_id, attempts, reason)] = database.dead_letters()
    assert (message_id, attempts) == ("poison", 3)
    assert reason.startswith("ForeignKeyViolation")


def test_worker_forgets_nothing_but_messages(database):
    database.query("SELECT idempotency.idempotency_store(NULL, 'payments.create', 'k', NULL, 201)")
    with psycopg.connect(database.worker_url, autocommit=True) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT idempotency.idempotency_forget(NULL, 'accounting', 'm1')")
        forgotten = connection.execute("SELECT queue.forget('payments.create', 'k')").fetchone()
    assert forgotten == (None,)
    assert database.seen() == ["k"]
