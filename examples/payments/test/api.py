"""
A client of the service that is logged in as one user.

Each request has a connection of its own, so that a service that was killed and started again never meets
one of its former life, and headers are sent as they are given, also twice.
"""

import json
import random
import time
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

#: Seconds after which a test gives up: far more than anything takes, so that no test depends on it.
PATIENCE = 60


@dataclass
class Answer:
    """What was answered."""

    status: int
    headers: Message
    content: bytes

    @property
    def data(self):
        """What a request that succeeded is answered with."""
        return json.loads(self.content)["data"]

    @property
    def error(self):
        """What is wrong, of a request that did not succeed. There is nothing beside, and nothing missing."""
        body = json.loads(self.content)
        assert list(body) == ["error"]
        assert list(body["error"]) == ["code", "message", "details"]
        return body["error"]

    @property
    def summary(self):
        """The status and the code of the error."""
        return self.status, self.error["code"]

    @property
    def replayed(self):
        """Whether it says that it is a replay."""
        return self.headers["Idempotent-Replayed"] == "true"


class Api:
    """The routes of the service, for one user."""

    def __init__(self, url, login=None):
        self._address = urlsplit(url).netloc
        self._login = {} if login is None else {"Authorization": f"Bearer {login}"}
        #: the statuses that made it repeat a request
        self.repeated_after = set()

    def send(self, method, path, body=None, key=None, headers=None):
        """
        Send a request, and return the answer.

        body: bytes are sent as they are, None not at all, anything else as JSON.
        key: a list sends the header that many times, None not at all.

        Raises OSError or HTTPException if the connection is lost before the answer is complete.
        """
        connection = self.begin(method, path, body, key, headers)
        try:
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def begin(self, method, path, body=None, key=None, headers=None):
        """Send a request, and return its connection without waiting for the answer."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        fields = {**self._login, **(headers or {})}
        if content is not None:
            fields = {"Content-Type": "application/json", "Content-Length": str(len(content)), **fields}
        connection = HTTPConnection(self._address, timeout=PATIENCE)
        connection.putrequest(method, path)
        for name, value in fields.items():
            connection.putheader(name, value)
        for value in [] if key is None else key if isinstance(key, list) else [key]:
            connection.putheader("Idempotency-Key", value)
        connection.endheaders(content)
        return connection

    def get(self, path):
        return self.send("GET", path)

    def post(self, path, body=None, key=None, **options):
        return self.send("POST", path, body, key, **options)

    def insist(self, path, body=None, key=None):
        """Repeat a POST with its key until the answer is final, as a client should."""
        end = time.monotonic() + PATIENCE
        attempt = 0
        while True:
            answer = None
            try:
                answer = self.post(path, body, key)
            except (OSError, HTTPException):
                pass
            if answer is not None:
                if not _comes_again(answer):
                    return answer
                self.repeated_after.add(answer.status)
            assert time.monotonic() < end, f"no final answer: {answer}"
            time.sleep(min(0.02 * 2**attempt, 0.5) * (0.5 + random.random() / 2))
            attempt += 1


def _comes_again(answer):
    return answer.status >= 500 or (answer.status == 409 and answer.headers["Retry-After"] is not None)
