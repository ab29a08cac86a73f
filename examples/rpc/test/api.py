"""What the two ways of making requests share: what is asked, and what comes back."""

import dataclasses
import json
import time

ANON = "anon"


@dataclasses.dataclass
class Answer:
    """What a client gets."""

    status: int
    headers: list
    body: bytes

    def values(self, name):
        """The values of a header, in their order."""
        return [value for field, value in self.headers if field.lower() == name.lower()]

    def header(self, name):
        """The value of a header that must not be there twice; None if it is missing."""
        values = self.values(name)
        assert len(values) <= 1, f"{name} was sent {len(values)} times"
        return values[0] if values else None

    @property
    def replayed(self):
        return self.header("Idempotent-Replayed") == "true"

    def json(self):
        return json.loads(self.body)


class Api:
    """Requests to functions; a subclass has `request`, which makes one."""

    runs_conflicts_again = False  # by itself, before the client hears of them

    def post(self, function, body, *, key=None, login=None, headers=()):
        """Call a function with a body, which is a text or what JSON is made of."""
        text = body if isinstance(body, str) else json.dumps(body)
        if key is not None:
            headers = [*headers, ("Idempotency-Key", key)]
        return self.request("POST", function, text, [("Content-Type", "application/json"), *headers], login, {})

    def get(self, function, *, login=None, **query):
        """Call a function with its parameters by their names."""
        return self.request("GET", function, "", [], login, query)


def until(condition, what):
    """Wait until a condition holds, and fail when it does not within half a minute."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.01)
