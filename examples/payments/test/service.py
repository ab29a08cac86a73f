"""
The service as a process of its own, to be stopped, killed and started again.

It is started as its users start it, by ``start``. It leads a process group of its own, so that what it
starts dies with it.
"""

import os
import signal
import socket
import subprocess
import tempfile
from http.client import HTTPException
from pathlib import Path

from api import PATIENCE, Api
from database import until

EXAMPLE = Path(__file__).resolve().parent.parent


class Service:
    """A service for a database, from the folder of the example or a changed copy of it."""

    def __init__(self, database, folder=EXAMPLE):
        self._database = database
        self._folder = folder
        self._port = _free_port()
        self._log = tempfile.TemporaryFile("w+")
        self._process = None
        self.url = f"http://127.0.0.1:{self._port}"
        self.launch()

    def launch(self):
        """Start it, without waiting until it is ready."""
        self._process = subprocess.Popen(
            [self._folder / "start"],
            env={**os.environ, "DATABASE_URL": self._database.url, "HOST": "127.0.0.1", "PORT": str(self._port)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ready(self):
        """Wait until it is ready."""
        until(lambda: self._process.poll() is not None or self._is_healthy(), "the service to be ready")
        assert self._process.poll() is None, f"the service has ended:\n{self.log}"
        return self

    def _is_healthy(self):
        try:
            return Api(self.url).get("/health").status == 200
        except (OSError, HTTPException):
            return False

    @property
    def log(self):
        """All that it has written, in all its lives."""
        self._log.seek(0)
        return self._log.read()

    def kill(self):
        """Kill it at once, as ``kill -9`` does, and wait until it is gone."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        until(lambda: not self.is_left(), "the service to be gone")

    def signal(self, number):
        """Ask it to stop, as Ctrl-C and systemd do."""
        self._process.send_signal(number)

    def status(self):
        """Wait until it has ended, and return its status."""
        return self._process.wait(timeout=PATIENCE)

    def listens(self):
        """Whether it takes requests."""
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self._port)) == 0

    def is_left(self):
        """Whether any process of it still runs."""
        return any(group == self._process.pid for group in _running_groups())

    def restart(self):
        """Kill it, and start it again at the same address."""
        self.kill()
        self.launch()
        self.ready()

    def close(self):
        """Kill it if it still runs."""
        self.kill()
        self._log.close()


def _running_groups():
    """The process groups of all processes that run; those that only wait to be buried do not."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group, *_ = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":
            yield int(group)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
