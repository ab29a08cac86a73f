"""Two workers that have the same message at the same time.

The first one waits in its work, the second one in first_seen for the first.  Then the
first one commits, dies or fails.
"""

import pytest

from conftest import until

BOB = "SELECT FROM accounts WHERE name = 'bob' FOR UPDATE"


@pytest.fixture
def pair(database, start):
    """The two workers, each with a delivery of m1 and a message of its own, and the
    lock that the first one waits for."""
    lock = database.lock(BOB)
    database.publish(("m0", "alice", 1), ("m1", "bob", 1))
    first = start(attempts=100000)
    first.waits("ledger")
    database.publish(("m1", "bob", 1), ("m2", "alice", 1))
    second = start(attempts=100000)
    second.waits("first_seen")
    assert database.effects() == []
    return first, second, lock


def test_first_one_commits(database, pair):
    *_, lock = pair
    lock.release()
    database.drained()
    assert database.effects() == ["m0", "m1", "m2"]


def test_first_one_dies(database, pair):
    first, _, lock = pair
    first.vanish()
    lock.release()
    until(lambda: database.effects() == ["m1", "m2"], "the second one to do it")
    database.pass_time()
    database.drained()
    assert database.effects() == ["m0", "m1", "m2"]


def test_first_one_fails(database, pair):
    """What it forgets is new for the second one, which fails as well, until it works."""
    *_, lock = pair
    lock.release("DELETE FROM accounts WHERE name = 'bob'")
    until(lambda: database.value("""SELECT count(*) = 2 AND min(attempts) >= 2
                                      FROM queue.deliveries WHERE message_id = 'm1'"""),
          "both to come again")
    assert (database.effects(), database.seen()) == (["m0", "m2"], ["m0", "m2"])
    database.query("INSERT INTO accounts VALUES ('bob')")
    database.drained()
    assert database.effects() == ["m0", "m1", "m2"]


def test_visibility_of_a_slow_one_runs_out(database, start):
    """The second one gets the very deliveries that the first one still works on."""
    lock = database.lock(BOB)
    database.publish(("m1", "bob", 1))
    start().waits("ledger")
    database.pass_time()
    start().waits("first_seen")
    lock.release()
    database.drained()
    assert database.effects() == ["m1"]
