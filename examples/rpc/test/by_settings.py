"""Requests without PostgREST, for machines that do not have it.

This does to the database what PostgREST does for a request to /rpc, so that the
functions see what they would see, and reads the answer where PostgREST reads it:

1. log in as the authenticator, and begin a transaction: read-only for GET and for
   functions that are not volatile, at the isolation level of the role
2. set for this transaction the search_path, the settings of the role, the role, and
   the claims, method, path and headers of the request
3. select the function, which gets the body as its parameter without a name, or the
   parameters of the query by their names; beside its result, response.headers and
   response.status
4. commit, whatever the status is, or roll back after an error
5. make the answer of these, or of the error: PGRST carries a whole answer, and for
   the others there is a table of statuses

The statements, what is in them in which order, and the table are those of PostgREST
16.  What PostgREST does before and after, such as looking at the token, is not here.
"""

import dataclasses
import json

import psycopg

from api import ANON, Answer, Api

JSON = "application/json; charset=utf-8"


@dataclasses.dataclass
class Routine:
    """What PostgREST knows of a function from its cache of the schema."""

    name: str
    volatile: bool
    unnamed: bool
    any_media: bool


class BySettings(Api):
    name = "the settings that PostgREST makes, by SQL"

    def __init__(self, database):
        """The connection parameters of a database, with the authenticator as user."""
        self.database = database

    def close(self):
        """Nothing is left open between requests."""

    def request(self, method, function, body, headers, login, query):
        role = (login or {}).get("role", ANON)
        claims = {**(login or {}), "role": role}
        try:
            with psycopg.connect(**self.database, autocommit=True) as connection:
                routine = find_routine(connection, function)
                if routine is None or routine.unnamed != (method == "POST"):
                    return refusal(404, "PGRST202", f"Could not find the function api.{function}")
                arguments = [payload(body)] if routine.unnamed else query

                begin(connection, role, read_only=method == "GET" or not routine.volatile)
                set_request(connection, claims, method, f"/rpc/{function}", headers)
                found = call(connection, routine, arguments)
                connection.execute("COMMIT")
        except ValueError:
            return refusal(400, "PGRST102", "Empty or invalid json")
        except psycopg.Error as error:
            return answer_of_error(error, authenticated=role != ANON)
        return answer_of(routine, *found)


#
# The request
#


def find_routine(connection, name):
    """A function of the schema api, or None."""
    row = connection.execute(
        """SELECT provolatile = 'v', pronargs = 1 AND proargnames IS NULL, typname = '*/*'
           FROM pg_proc JOIN pg_type ON pg_type.oid = prorettype
           WHERE pronamespace = 'api'::regnamespace AND proname = %s""", [name]).fetchone()
    return row and Routine(name, *row)


def payload(body):
    """A body of JSON as the function gets it: an object as it came, and [] for what is neither
    an object nor an array of objects with the same keys."""
    content = json.loads(body) if body else {}
    if isinstance(content, list) and content and isinstance(content[0], dict):
        if any(not isinstance(item, dict) or item.keys() != content[0].keys() for item in content):
            raise ValueError("all objects must have the same keys")
        return body
    return body if isinstance(content, dict) else "[]"


def begin(connection, role, *, read_only):
    level = role_settings(connection, role).get("default_transaction_isolation", "read committed")
    connection.execute(f"BEGIN ISOLATION LEVEL {level} {'READ ONLY' if read_only else 'READ WRITE'}")


def role_settings(connection, role):
    """The settings of a role, without those that the authenticator may not set."""
    return dict(connection.execute(
        """WITH setting AS (
               SELECT split_part(line, '=', 1) AS name, substr(line, strpos(line, '=') + 1) AS value
               FROM pg_roles, unnest(rolconfig) AS line WHERE rolname = %s)
           SELECT setting.name, value FROM setting JOIN pg_settings USING (name)
           WHERE context = 'user' OR has_parameter_privilege(name, 'SET')""", [role]).fetchall())


def set_request(connection, claims, method, path, headers):
    """What the functions can read of the request."""
    of_role = role_settings(connection, claims["role"])
    of_role.pop("default_transaction_isolation", None)
    settings = {
        "search_path": '"api", "public"',
        **of_role,
        "role": claims["role"],
        "request.jwt.claims": json.dumps(claims),
        "request.method": method,
        "request.path": path,
        # of a header that was sent twice, the last one stays
        "request.headers": json.dumps({name.lower(): value for name, value in headers}),
        "request.cookies": "{}",
    }
    values = [part for setting in settings.items() for part in setting]
    connection.execute("SELECT " + ", ".join(["set_config(%s, %s, true)"] * len(settings)), values)


def call(connection, routine, arguments):
    """The body, the headers and the status, as the database gives them."""
    if routine.unnamed:
        given, values = "%s::json", arguments
    else:
        given, values = ", ".join(f'"{name}" := %s::text' for name in arguments), list(arguments.values())
    if routine.any_media:
        content = 'api."*/*"(_postgrest_t.pgrst_scalar)'
    else:
        content = "coalesce(json_agg(_postgrest_t.pgrst_scalar)->0, 'null')::text"
    return connection.execute(
        f"""WITH pgrst_source AS (
                SELECT pgrst_call.pgrst_scalar
                FROM (SELECT "api"."{routine.name}"({given}) pgrst_scalar) pgrst_call)
            SELECT {content} AS body,
                   nullif(current_setting('response.headers', true), '') AS response_headers,
                   nullif(current_setting('response.status', true), '') AS response_status
            FROM (SELECT * FROM pgrst_source) _postgrest_t""", values).fetchone()


#
# The answer
#


def answer_of(routine, body, headers, status):
    """The answer of a request that was committed."""
    own = [("Content-Type", "application/octet-stream" if routine.any_media else JSON)]
    given = []
    for field in json.loads(headers or "[]"):
        if len(field) != 1 or not all(isinstance(value, str) for value in field.values()):
            return refusal(500, "PGRST111", "response.headers guc must be a JSON array "
                           "composed of objects with a single key and a string value")
        given.extend(field.items())
    overridden = {name.lower() for name, _ in given}
    headers = [(name, value) for name, value in own if name.lower() not in overridden] + given

    status = int(status or 200)
    content = body if isinstance(body, bytes) else body.encode()
    # the web server sends no body where there must be none
    return Answer(status, headers, b"" if status == 204 else content)


def answer_of_error(error, *, authenticated):
    """What PostgREST makes of an error of the database."""
    if error.sqlstate == "PGRST":
        message, detail = json.loads(error.diag.message_primary), json.loads(error.diag.message_detail)
        # the shape that is asked for; another one is PGRST121
        assert isinstance(detail["status"], int)
        assert all(isinstance(value, str) for value in detail["headers"].values())
        return refusal(detail["status"], message["code"], message["message"], message.get("details"),
                       message.get("hint"), detail["headers"])
    return refusal(status_of(error.sqlstate, authenticated), error.sqlstate or "PGRST001",
                   error.diag.message_primary or str(error), error.diag.message_detail, error.diag.message_hint)


STATUSES = {
    "23503": 409, "23505": 409, "25006": 405, "21000": 500, "53400": 500, "57P01": 503, "P0001": 400,
    "42883": 404, "42P01": 404, "42P17": 500,
    "08": 503, "09": 500, "0L": 403, "0P": 403, "25": 500, "28": 403, "2D": 500, "38": 500, "39": 500, "3B": 500,
    "40": 500, "53": 503, "54": 500, "55": 500, "57": 500, "58": 500, "F0": 500, "HV": 500, "P0": 500, "XX": 500,
}


def status_of(state, authenticated):
    """The status for a SQLSTATE, or for a connection that was lost without one."""
    if state is None:
        return 503
    if state.startswith("PT"):
        return int(state[2:])
    if state == "42501":
        return 403 if authenticated else 401
    return STATUSES.get(state, STATUSES.get(state[:2], 400))


def refusal(status, code, message, details=None, hint=None, headers=None):
    """An answer in the form that PostgREST gives all errors."""
    body = {"code": code, "message": message, "details": details, "hint": hint}
    return Answer(status, [("Content-Type", JSON), *(headers or {}).items()], json.dumps(body).encode())
