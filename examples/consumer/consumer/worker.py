"""A worker: takes deliveries, works on them, acknowledges them, until it is stopped.

    DATABASE_URL=... python3 -m consumer.worker accounting

Any number of workers may run.  SIGTERM and SIGINT let it finish its batch and
stop.  When the connection is lost, it opens another one and goes on; the deliveries
that it had come again, to whoever asks for some.
"""

import argparse
import logging
import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta

import psycopg

from .batch import consume
from .queue import Delivery, Queue
from .work import WORK

# Seconds until an empty queue is asked again, and until a lost connection is opened
# again
POLL = 0.1
RECONNECT = 0.5

# How long ids are remembered: as long as idempotency.max_ttl allows by default.
# A delivery that comes later than that is worked on again.
REMEMBER = timedelta(hours=72)

log = logging.getLogger("consumer")


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    consumer: str
    batch: int
    visibility: timedelta
    attempts: int
    delay: timedelta


class Worker:
    """Works for a consumer until `stop` is called."""

    def __init__(self, url: str, settings: Settings):
        self._url = url
        self._settings = settings
        self._stopping = False

    def stop(self, *_: object) -> None:
        """Let the worker stop after its batch.  It is the handler of a signal."""
        self._stopping = True

    def run(self) -> None:
        """Work, on one connection after the other.

        Raises what no other connection would change, such as a missing table.
        """
        while not self._stopping:
            try:
                with self._connect() as connection:
                    self._work(connection)
            except psycopg.OperationalError as error:
                log.warning("connection was lost: %s", error)
                time.sleep(RECONNECT)

    def _connect(self) -> psycopg.Connection:
        name = f"{self._settings.consumer} worker {os.getpid()}"
        return psycopg.connect(self._url, autocommit=True, application_name=name)

    def _work(self, connection: psycopg.Connection) -> None:
        queue = Queue(connection, self._settings.consumer,
                      visibility=self._settings.visibility, attempts=self._settings.attempts)
        while not self._stopping:
            deliveries = queue.receive(self._settings.batch)
            if deliveries:
                failures = self._consume(connection, deliveries)
                self._settle(queue, deliveries, failures)
            else:
                time.sleep(POLL)

    def _consume(self, connection: psycopg.Connection,
                 deliveries: list[Delivery]) -> dict[str, Exception]:
        """Why messages have failed, by their ids; all of them, if the batch has."""
        try:
            return consume(connection, self._settings.consumer, deliveries,
                           WORK[self._settings.consumer], remember=REMEMBER,
                           patience=self._settings.visibility)
        except Exception as error:
            # if it was for a lost connection, nor can the queue be told
            log.warning("batch failed: %s", error)
            return {delivery.message_id: error for delivery in deliveries}

    def _settle(self, queue: Queue, deliveries: list[Delivery],
                failures: dict[str, Exception]) -> None:
        """Tell the queue what became of deliveries, after the COMMIT of their work."""
        queue.acknowledge([delivery for delivery in deliveries
                           if delivery.message_id not in failures])
        for delivery in deliveries:
            failure = failures.get(delivery.message_id)
            if failure is not None:
                reason = f"{type(failure).__name__}: {failure}"
                log.warning("message %s failed: %s", delivery.message_id, reason)
                queue.reject(delivery, reason, self._settings.delay)


def read_arguments() -> Settings:
    """The settings, from the command line."""
    def seconds(text: str) -> timedelta:
        return timedelta(seconds=float(text))

    parser = argparse.ArgumentParser(prog="consumer.worker", description="Work on messages.")
    parser.add_argument("consumer", choices=sorted(WORK))
    parser.add_argument("--batch", type=int, default=100,
                        help="how many deliveries to take at once (100)")
    parser.add_argument("--visibility", type=seconds, default="30", metavar="SECONDS",
                        help="after which a delivery that is not acknowledged comes again (30)")
    parser.add_argument("--attempts", type=int, default=5,
                        help="after how many of them a delivery is a dead letter (5)")
    parser.add_argument("--delay", type=seconds, default="5", metavar="SECONDS",
                        help="after which a message that failed comes again (5)")
    return Settings(**vars(parser.parse_args()))


def main() -> None:
    """Work until a signal comes."""
    logging.basicConfig(format="%(asctime)s %(process)d %(levelname)s %(message)s")
    worker = Worker(os.environ["DATABASE_URL"], read_arguments())
    signal.signal(signal.SIGTERM, worker.stop)
    signal.signal(signal.SIGINT, worker.stop)
    worker.run()


if __name__ == "__main__":
    main()
