"""
A proxy that cuts connections, for tests of what is lost on the way.

It stands between a client and PostgreSQL and passes on what either sends, one message of the protocol after
the other. A test says at which message a connection ends, such as the one that tells the client of its
COMMIT: the server has committed then, and the client does not know.

What was passed on before the cut still arrives. After it, both sides find the connection closed, as when a
process in the middle died, and nothing more of the client reaches the server. The client finds it last: its
transaction is over by then, and what it does next does not depend on who is faster.

Encryption is refused, as the messages could not be read.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

_ENCRYPTION_REQUESTS = (80877103, 80877104)


@dataclass(frozen=True)
class Message:
    """
    A message of the protocol.

    origin: ``client`` or ``server``.
    type: its letter, or ``startup`` for the first of a client, which has none.
    text: its content.
    """

    origin: str
    type: str
    text: str


Condition = Callable[[Message], bool]


def before_statement(pattern: str) -> Condition:
    """Before a statement of the client reaches the server, so that it is never run."""
    return (
        lambda message: message.origin == "client" and message.type in "QP" and bool(re.search(pattern, message.text))
    )


def before_answer(tag: str) -> Condition:
    """Before the client hears that the server has run a command, which it then has."""
    return lambda message: message.origin == "server" and message.type == "C" and message.text.startswith(tag)


def at_client_message(number: int) -> Condition:
    """At a message of the client, counted from one from now on over all connections."""
    count = 0

    def is_it(message: Message) -> bool:
        nonlocal count
        count += message.origin == "client"
        return message.origin == "client" and count == number

    return is_it


class CutProxy:
    """
    A proxy in front of the server of a URL.

    url: the same database through the proxy.
    cuts: how many connections were cut so far.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = parts._replace(netloc=f"{parts.username or 'postgres'}@127.0.0.1:{port}").geturl()
        self.cuts = 0
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self.pass_all()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_when(self, condition: Condition, *, times: int = 1, after: bool = False, noticed: bool = True) -> None:
        """
        Cut a connection at the first message that meets a condition, from now on.

        times: how many connections to cut.
        after: whether the message itself is still passed on.
        noticed: False if only the client finds the connection closed, and the server not before ``let_server_notice``.
        """
        with self._lock:
            self._condition, self._times, self._after, self._noticed = condition, times, after, noticed

    def pass_all(self) -> None:
        """Cut no more connections."""
        self.cut_when(lambda message: False, times=0)

    def let_server_notice(self) -> None:
        """Close the server's side of connections that were cut unnoticed."""
        for link in list(self._links):
            if link.is_cut:
                _close(link.server)

    def close(self) -> None:
        """Cut all connections, and take no more."""
        _close(self._listener)
        for link in list(self._links):
            link.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                link = _Link(client, socket.create_connection(self._target))
            except OSError:
                return
            self._links.add(link)
            for origin in ("client", "server"):
                threading.Thread(target=self._pass_on, args=(link, origin), daemon=True).start()

    def _pass_on(self, link: _Link, origin: str) -> None:
        """Pass on what comes from one side, until the connection is closed."""
        source, destination = (link.client, link.server) if origin == "client" else (link.server, link.client)
        received = b""
        has_type = origin == "server"
        try:
            while chunk := source.recv(65536):
                received += chunk
                while not link.is_cut and (size := _size(received, has_type)):
                    message, received = received[:size], received[size:]
                    if not has_type and struct.unpack("!i", message[4:8])[0] in _ENCRYPTION_REQUESTS:
                        source.sendall(b"N")
                        continue
                    text = message[5 if has_type else 4 :].decode("utf-8", "replace")
                    self._pass_message(
                        link, Message(origin, chr(message[0]) if has_type else "startup", text), message, destination
                    )
                    has_type = True
        except OSError:
            pass
        if origin == "server" or not link.is_cut:
            link.close()
            self._links.discard(link)

    def _pass_message(self, link: _Link, message: Message, content: bytes, destination: socket.socket) -> None:
        with self._lock:
            if link.is_cut:
                return
            cut = self._times > 0 and self._condition(message)
            if not cut or self._after:
                destination.sendall(content)
            if cut:
                link.is_cut = True
                self._times -= 1
                self.cuts += 1
                if self._noticed:
                    # the server closes its side in turn, and then the client's is closed
                    link.server.shutdown(socket.SHUT_WR)
                else:
                    _close(link.client)


class _Link:
    """A connection of a client, and the one to the server that it goes on with."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.is_cut = False
        for side in (client, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        _close(self.client)
        _close(self.server)


def _close(side: socket.socket) -> None:
    # closing alone does not wake a thread that reads
    try:
        side.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    side.close()


def _size(received: bytes, has_type: bool) -> int:
    """The size of the first message of what has come, or 0 if it is not whole."""
    header = 5 if has_type else 4
    if len(received) < header:
        return 0
    size = int(struct.unpack("!i", received[header - 4 : header])[0]) + header - 4
    return size if len(received) >= size else 0
