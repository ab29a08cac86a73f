"""Requests over HTTP to a PostgREST that is started for them."""

import contextlib
import http.client
import json
import os
import pathlib
import re
import socket
import subprocess
import urllib.parse

import psycopg

from api import ANON, Answer, Api, until

EXAMPLE = pathlib.Path(__file__).resolve().parent.parent


class ByHttp(Api):
    name = "PostgREST, over HTTP"

    def __init__(self, database):
        """Start PostgREST, which logs in with these connection parameters, and wait until it is ready."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(["postgrest"], env={
            **os.environ,
            "PGRST_DB_URI": psycopg.conninfo.make_conninfo(**database),
            "PGRST_DB_SCHEMAS": "api",
            "PGRST_DB_ANON_ROLE": ANON,
            "PGRST_JWT_SECRET": (EXAMPLE / "demo.secret").read_text().strip(),
            "PGRST_SERVER_HOST": "127.0.0.1",
            "PGRST_SERVER_PORT": str(self.port),
        })
        until(self._ready, "PostgREST is ready")
        version = subprocess.run(["postgrest", "--version"], check=True, capture_output=True, text=True, timeout=30)
        self.runs_conflicts_again = int(re.search(r"\d+", version.stdout)[0]) < 16

    def close(self):
        self.process.terminate()
        self.process.wait(30)

    def _ready(self):
        assert self.process.poll() is None, "PostgREST has ended"
        with contextlib.suppress(OSError):
            return self._send("GET", "/health", "", []).status == 200
        return False

    def request(self, method, function, body, headers, login, query):
        if login:
            headers = [*headers, ("Authorization", f"Bearer {token(login)}")]
        path = f"/rpc/{function}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        return self._send(method, path, body, headers)

    def _send(self, method, path, body, headers):
        content = body.encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(method, path)
            for name, value in [*headers, ("Content-Length", str(len(content)))]:
                connection.putheader(name, value.encode())
            connection.endheaders(content)
            response = connection.getresponse()
            return Answer(response.status, response.getheaders(), response.read())


def token(claims):
    """A token of these claims, made as a reader of the example makes one."""
    command = [EXAMPLE / "login", json.dumps(claims)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
