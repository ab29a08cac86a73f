"""10,000 deliveries of 6,000 messages by 8 workers that are killed, on a server that crashes.

Whenever another part of the queue has been worked off, one of the workers is killed
by SIGKILL, wherever it is, and another one started.  A process of the server is killed
too, which makes it drop all connections and recover, and once all of it is stopped
without a checkpoint and started again.  Some messages fail until the middle.  In the
end there is one effect of each message, and nothing in the queue.
"""

import os
import random
import signal
import subprocess

import psycopg
import pytest

from conftest import until
from consumer.producer import payments

MESSAGES = 6000
DELIVERIES = 10000
WORKERS = 8
KILLS = 40


def kill_a_worker(storm):
    """Kill a worker by SIGKILL, and start another one."""
    worker = storm.workers.pop(random.randrange(len(storm.workers)))
    worker.kill()
    storm.workers.append(storm.start_worker())


def open_the_account(storm):
    """Let those messages work that have failed until now."""
    storm.database.query("INSERT INTO accounts VALUES ('carol')")


def kill_a_server_process(storm):
    """Kill a process of the server by SIGKILL, for which it restarts all of them."""
    with psycopg.connect(storm.database.url) as connection:
        os.kill(connection.info.backend_pid, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            until(lambda: connection.execute("SELECT false").fetchone()[0], "the crash")


def crash_the_server(_):
    """Stop the server without a checkpoint, and start it again."""
    log = f"{os.environ['PGDATA']}.log"
    subprocess.run(["pg_ctl", "stop", "-m", "immediate", "-w", "-s"], check=True)
    subprocess.run(["pg_ctl", "start", "-w", "-s", "-l", log], check=True)


class Storm:
    """The workers, and what is left for them."""

    def __init__(self, database, start):
        self.database = database
        self.start_worker = lambda: start(batch=50, visibility=2, attempts=1000, delay=1)
        self.workers = [self.start_worker() for _ in range(WORKERS)]
        self.came_again = 0

    def is_down_to(self, number):
        """Whether at most so many deliveries are left."""
        try:
            [(left, again)] = self.database.query(
                "SELECT count(*), count(*) FILTER (WHERE attempts > 1 AND reason IS NULL)"
                " FROM queue.deliveries")
        except psycopg.OperationalError:
            return False    # the server is about to come back
        self.came_again = max(self.came_again, again)
        return left <= number


def test_each_effect_once(database, start):
    messages = payments(MESSAGES, DELIVERIES, accounts=["alice"] * 98 + ["bob", "carol"])
    database.deliver(messages)
    storm = Storm(database, start)

    # what happens when how many deliveries are left
    events = [(DELIVERIES * number // (KILLS + 1), kill_a_worker) for number in range(1, KILLS + 1)]
    events.append((DELIVERIES // 2, open_the_account))
    if "PGDATA" in os.environ:
        events.append((DELIVERIES * 2 // 3, kill_a_server_process))
        events.append((DELIVERIES // 3, crash_the_server))
    for left, event in sorted(events, key=lambda event: event[0], reverse=True):
        until(lambda: storm.is_down_to(left), f"the queue to be down to {left}")
        event(storm)
    until(lambda: storm.is_down_to(0), "the queue to be empty")

    assert [worker.stop(signal.SIGTERM) for worker in storm.workers] == [0] * WORKERS
    ids = sorted({message_id for message_id, _ in messages})
    assert (len(messages), len(ids)) == (DELIVERIES, MESSAGES)
    assert database.effects() == ids
    assert database.seen() == ids
    assert database.dead_letters() == []
    assert storm.came_again > 0, "no worker was killed while it had deliveries"
