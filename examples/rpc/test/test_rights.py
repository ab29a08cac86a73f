"""What those can do who send requests, and what they cannot."""

import contextlib
import json
import os

import psycopg
import pytest
from psycopg import sql

from conftest import ByEither, new_database
from world import ALICE, STRANGER, balance, make_account, payments

FUNCTIONS = """
    SELECT oid::regprocedure::text AS name, proconfig, prosqlbody IS NOT NULL AS parsed, prosecdef,
           has_function_privilege('anon', oid, 'EXECUTE') AS for_anon,
           has_function_privilege('web_user', oid, 'EXECUTE') AS for_user, pronamespace::regnamespace::text AS schema
    FROM pg_proc WHERE pronamespace IN ('api'::regnamespace, 'private'::regnamespace)
      AND oid::regprocedure::text !~ 'scenario|raise'"""


# A schema that a caller puts first: whoever calls its functions or uses its operators is trapped
TRAPS = """
    CREATE SCHEMA evil;
    GRANT USAGE ON SCHEMA evil TO PUBLIC;
    CREATE FUNCTION evil.trap() RETURNS text LANGUAGE plpgsql
    AS 'BEGIN RAISE EXCEPTION ''trapped as %'', current_user; END';

    CREATE FUNCTION evil.set_config(text, text, boolean) RETURNS text LANGUAGE sql RETURN evil.trap();
    CREATE FUNCTION evil.current_setting(text, boolean) RETURNS text LANGUAGE sql RETURN evil.trap();
    CREATE FUNCTION evil.btrim(text, text) RETURNS text LANGUAGE sql RETURN evil.trap();
    CREATE FUNCTION evil.format(text, bigint) RETURNS text LANGUAGE sql RETURN evil.trap();
    CREATE FUNCTION evil.equal(text, text) RETURNS boolean LANGUAGE sql RETURN evil.trap() IS NULL;
    CREATE FUNCTION evil.get(jsonb, text) RETURNS text LANGUAGE sql RETURN evil.trap();
    CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.equal);
    CREATE OPERATOR evil.->> (LEFTARG = jsonb, RIGHTARG = text, FUNCTION = evil.get);
    """


@contextlib.contextmanager
def session(database, login):
    """A transaction of somebody who can run any SQL as the user of a request."""
    with database.connect("authenticator") as connection, connection.transaction():
        connection.execute(
            "SELECT set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
            [login["role"], json.dumps(login)])
        yield connection


@pytest.mark.parametrize("statement", [
    "SELECT idempotency.idempotency_replay('acme', 'payments.create', 'k')",
    "SELECT idempotency.idempotency_try_run('acme', 'payments.create', 'k', '{}', 'pg_catalog.jsonb_typeof(jsonb)')",
    "SELECT * FROM idempotency.idempotency_key",
    "SELECT * FROM private.accounts",
    "SELECT private.create_payment('{}')",
    "CREATE TABLE api.mine ()",
])
@pytest.mark.parametrize("role", ["anon", "web_user", "authenticator"])
def test_nothing_but_what_is_exposed_can_be_reached(database, role, statement):
    with database.connect("authenticator") as connection:
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement)


def test_only_what_is_exposed_may_be_executed_and_by_no_strangers(admin):
    found = admin.execute(FUNCTIONS).fetchall()
    assert len(found) >= 15
    for name, _, _, definer, for_anon, for_user, schema in found:
        assert not for_anon, name
        assert (for_user, definer) == (schema == "api", schema == "api"), name


def test_every_function_says_where_it_looks_for_names(admin):
    found = admin.execute(FUNCTIONS).fetchall()
    for name, settings, parsed, *_ in found:
        assert parsed or settings == ["search_path=pg_catalog, pg_temp"], name


def test_handler_that_is_in_use_cannot_be_dropped(admin):
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        admin.execute("DROP FUNCTION private.create_payment(jsonb)")


def test_search_path_and_temporary_objects_of_the_caller_count_for_nothing(database, admin, account, key):
    """Whatever a user puts before pg_catalog and the tables, the functions do not see it."""
    admin.execute(TRAPS)
    with session(database, ALICE) as connection:
        connection.execute("SELECT set_config('request.headers', %s, true)", [json.dumps({"idempotency-key": key})])
        connection.execute("CREATE TEMP TABLE accounts (id text, balance numeric)")
        connection.execute("CREATE TEMP TABLE payments (id int, account text, amount numeric)")
        connection.execute("SET LOCAL search_path = pg_temp, evil, pg_catalog")
        with pytest.raises(psycopg.errors.RaiseException, match="trapped as web_user"), connection.transaction():
            connection.execute("SELECT current_setting('request.headers', true)")
        found = connection.execute("SELECT api.create_payment(%s::json)",
                                   [json.dumps({"account": account, "amount": 1})]).fetchone()
        status = connection.execute("SELECT pg_catalog.current_setting('response.status', true)").fetchone()
        assert (found[0]["amount"], status) == (1, ("201",))
        looked = connection.execute("SELECT api.request_status('payments.create', %s)", [key]).fetchone()
        assert json.loads(looked[0]) == found[0]
    assert (payments(admin, account), balance(admin, account)) == (1, 99)


def test_views_show_the_rows_of_the_tenant_and_no_others(database, admin):
    mine, theirs = make_account(admin), make_account(admin, "other")
    with session(database, ALICE) as connection:
        seen = {name for name, in connection.execute("SELECT id FROM api.accounts")}
        assert mine in seen and theirs not in seen
    with session(database, STRANGER) as connection:
        seen = {name for name, in connection.execute("SELECT id FROM api.accounts")}
        assert theirs in seen and mine not in seen


def test_health_is_shown_to_strangers(database):
    with session(database, {"role": "anon"}) as connection:
        assert connection.execute("SELECT * FROM api.health").fetchall() == [("ok",)]


@pytest.fixture(scope="module")
def pinned(database):
    """The API of an authenticator that is pinned to the tenant acme."""
    asked = ByEither(database.parameters("acme_authenticator"))
    yield asked
    asked.close()


def test_authenticator_that_is_pinned_to_a_tenant_serves_no_other(pinned, admin, account, key):
    theirs = make_account(admin, "other")
    own = pinned.post("create_payment", {"account": account, "amount": 1}, key=key, login=ALICE)
    assert own.status == 201
    other = pinned.post("create_payment", {"account": theirs, "amount": 1}, key=key, login=STRANGER)
    assert (other.status, other.json()["code"]) == (403, "42501")
    assert payments(admin, theirs) == 0
    status = pinned.get("request_status", action="payments.create", key=key, login=STRANGER)
    assert (status.status, status.json()["code"]) == (403, "42501")


def test_role_that_is_pinned_to_a_tenant_is_so_only_if_the_authenticator_may_set_it(database, admin, api, key):
    body = {"account": make_account(admin, "other"), "amount": 1}
    login = {**STRANGER, "role": "acme_user"}
    assert api.post("create_payment", body, key=key, login=login).status == 201

    admin.execute("GRANT SET ON PARAMETER idempotency.tenant TO authenticator")
    asked = ByEither(database.parameters("authenticator"))
    try:
        other = asked.post("create_payment", body, key=key, login=login)
    finally:
        asked.close()
        admin.execute("REVOKE SET ON PARAMETER idempotency.tenant FROM authenticator")
    assert (other.status, other.json()["code"]) == (403, "42501")


def test_extension_may_be_in_any_schema(server, key):
    with new_database(server, f"rpc_{os.getpid()}_elsewhere") as database:
        with database.connect() as connection:
            connection.execute('DROP SCHEMA idempotency CASCADE; CREATE SCHEMA "of ours"')
            connection.execute('CREATE EXTENSION idempotency SCHEMA "of ours"')
            database.load()
            account = make_account(connection)
            asked = ByEither(database.parameters("authenticator"))
            try:
                answers = [asked.post("create_payment", {"account": account, "amount": 1}, key=key, login=ALICE)
                           for _ in range(2)]
            finally:
                asked.close()
            assert [(answer.status, answer.replayed) for answer in answers] == [(201, False), (201, True)]
            assert payments(connection, account) == 1
