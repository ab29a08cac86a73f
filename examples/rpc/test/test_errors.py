"""Every SQLSTATE of the extension, as a status: the table in docs/http.md, and what provokes each."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from api import until
from by_http import EXAMPLE
from world import ALICE, held, make_account, records, runs, waiting_for

PATIENCE = 60  # seconds after which a request that does not end is a failure
DOCUMENT = EXAMPLE.parent.parent / "docs" / "http.md"


def table():
    """The rows of the table, as SQLSTATE and the two last cells: PostgREST, and the wrapper."""
    section = DOCUMENT.read_text().split("## From SQLSTATE to HTTP")[1].split("\n## ")[0]
    rows = []
    for line in re.findall(r"^\| ([A-Z0-9]{5}(?:, [A-Z0-9]{5})*) \|(.*)\|$", section, re.MULTILINE):
        cells = [cell.strip() for cell in line[1].split("|")]
        rows.extend((state, cells[-2], cells[-1]) for state in line[0].split(", "))
    return rows


ROWS = table()


def status_in(cell):
    return int(re.match(r"\d{3}", cell)[0])


def test_table_has_every_sqlstate_of_the_extension():
    assert {state for state, _, _ in ROWS} >= {
        "ID001", "ID002", "ID003", "ID004", "ID005", "ID006", "ID007", "ID008", "22023", "22004", "22P02", "22P05",
        "25006", "40001", "40P01", "42501", "42883", "55P03", "57014"}


each_row = pytest.mark.parametrize("state, by_itself, wrapped", ROWS, ids=[state for state, _, _ in ROWS])


@each_row
def test_postgrest_by_itself(api, state, by_itself, wrapped):
    if api.runs_conflicts_again and state in ("40001", "40P01"):
        pytest.skip("this PostgREST would run it again for ever")
    answer = api.post("raise", {"state": state}, login=ALICE)
    assert (answer.status, answer.json()["code"]) == (status_in(by_itself), state)
    assert answer.header("Retry-After") is None


@each_row
def test_wrapper(api, admin, key, state, by_itself, wrapped):
    answer = api.post("scenario", {"do": "raise", "state": state}, key=key, login=ALICE)
    assert answer.status == status_in(wrapped)
    assert answer.json() == {"code": state, "message": "raised", "details": "on request", "hint": "ask for less"}
    assert answer.header("Retry-After") == ("1" if "`Retry-After`" in wrapped else None)
    assert (records(admin, key), runs(admin, key)) == ([], 0)


#
# What provokes them.  ID001, ID002, ID004 and what is about the body are in test_requests.py, ID003 of the
# request itself is in test_concurrency.py.
#


@pytest.fixture
def thread():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def check(answer, status, state):
    assert (answer.status, answer.json()["code"]) == (status, state)


def test_ID003_of_a_handler_that_begins_another_request(api, admin, key):
    with admin.transaction():
        admin.execute("SELECT idempotency.idempotency_begin('acme', 'test.other', %s)", [key])
        login = {**ALICE, "role": "patient_user"}
        answer = api.post("scenario", {"do": "begin another request"}, key=key, login=login)
        admin.execute("SELECT idempotency.idempotency_release('acme', 'test.other', %s)", [key])
    check(answer, 409, "ID003")
    assert answer.header("Retry-After") == "90"
    assert (records(admin, key), runs(admin, key)) == ([], 0)


def test_ID005_when_another_transaction_committed_a_record(api, database, admin, account, key, thread):
    with held(database, account) as holder:
        body = {"account": account, "amount": 1}
        first = thread.submit(api.post, "create_payment", body, key=key, login=ALICE)
        waiting_for(admin, holder)
        admin.execute(
            """INSERT INTO idempotency.idempotency_key (tenant, action, key, actor, state, status_code,
                                                        response, attempt, created_at, finished_at, expires_at)
               VALUES ('acme', 'payments.create', %s, 'alice', 'completed', 201, '{"elsewhere": 1}', 1,
                       now(), now(), now() + interval '1 hour')""", [key])
    answer = first.result(PATIENCE)
    check(answer, 409, "ID005")
    assert answer.header("Retry-After") == "1"
    again = api.post("create_payment", body, key=key, login=ALICE)
    assert (again.status, again.json(), again.replayed) == (201, {"elsewhere": 1}, True)


def test_ID006_comes_at_commit_and_undoes_all(api, admin, key):
    check(api.post("scenario", {"do": "begin another request"}, key=key, login=ALICE), 400, "ID006")
    assert (records(admin, key), runs(admin, key)) == ([], 0)


def test_ID007_for_an_answer_that_is_too_large(api, admin, key):
    check(api.post("scenario", {"do": "answer too much"}, key=key, login=ALICE), 500, "ID007")
    assert (records(admin, key), runs(admin, key)) == ([], 0)


def test_ID008_for_a_request_that_is_begun_twice(api, admin, key):
    check(api.post("scenario", {"do": "begin this request"}, key=key, login=ALICE), 500, "ID008")
    assert (records(admin, key), runs(admin, key)) == ([], 0)


def test_22004_for_an_action_that_is_null(api, key):
    check(api.post("scenario_without_action", {"do": "answer"}, key=key, login=ALICE), 500, "22004")


def test_22023_for_a_lifetime_that_is_too_short(api, admin, key):
    check(api.post("scenario", {"do": "answer for too short a time"}, key=key, login=ALICE), 500, "22023")
    assert (records(admin, key), runs(admin, key)) == ([], 0)


def test_22P02_of_a_handler_is_400(api, admin, account, key):
    check(api.post("create_payment", {"account": account, "amount": "much"}, key=key, login=ALICE), 400, "22P02")
    assert records(admin, key) == []


def test_25006_in_a_function_that_claims_to_change_nothing(api, key):
    check(api.post("scenario_that_is_stable", {"do": "answer"}, key=key, login=ALICE), 405, "25006")


def test_39004_for_a_handler_that_returns_null(api, admin, key):
    check(api.post("scenario", {"do": "return null"}, key=key, login=ALICE), 500, "39004")
    assert (records(admin, key), runs(admin, key)) == ([], 0)


def test_40001_under_serializable(api, database, admin, account, key, thread):
    login = {**ALICE, "role": "serializable_user"}
    body = {"account": account, "amount": 1}
    with held(database, account) as holder:
        first = thread.submit(api.post, "create_payment", body, key=key, login=login)
        waiting_for(admin, holder)
        holder.execute("UPDATE private.accounts SET balance = 50 WHERE id = %s", [account])
    answer = first.result(PATIENCE)
    check(answer, 503, "40001")
    assert answer.header("Retry-After") == "1"
    again = api.post("create_payment", body, key=key, login=login)
    assert (again.status, again.replayed) == (201, False)


def test_40P01_for_the_request_that_is_chosen(api, database, admin, key, thread):
    one, two = make_account(admin), make_account(admin)
    body = {"do": "lock two accounts", "first": one, "second": two}
    with database.connect() as gate, database.connect() as other, held(database, two) as holder:
        gate.execute("SELECT pg_advisory_lock(14, hashtext(%s))", [one])
        first = thread.submit(api.post, "scenario", body, key=key, login=ALICE)
        waiting_for(admin, gate)

        # whoever comes last to a circle of locks finds it, and that is to be the request
        holder.execute("SET LOCAL deadlock_timeout = '10min'")
        holder.execute("SET LOCAL lock_timeout = '1min'")
        row = "SELECT FROM private.accounts WHERE id = %s FOR UPDATE"
        crossing = thread.submit(holder.execute, row, [one])
        waits = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
        until(lambda: admin.execute(waits, [holder.info.backend_pid]).fetchone() is not None, "the other one waits")
        gate.execute("SELECT pg_advisory_unlock(14, hashtext(%s))", [one])
        answer = first.result(PATIENCE)
        crossing.result(PATIENCE)
    check(answer, 503, "40P01")
    assert answer.header("Retry-After") == "1"
    assert (records(admin, key), runs(admin, key)) == ([], 0)


def test_42809_for_a_handler_of_another_shape(api, key):
    check(api.post("scenario_of_another_shape", {"do": "answer"}, key=key, login=ALICE), 500, "42809")


def test_42883_of_a_handler_is_not_404(api, admin, key):
    check(api.post("scenario", {"do": "call what is not there"}, key=key, login=ALICE), 500, "42883")
    assert (records(admin, key), runs(admin, key)) == ([], 0)


def test_55P03_of_a_handler(api, database, admin, account, key):
    with held(database, account):
        answer = api.post("scenario", {"do": "lock without waiting", "account": account}, key=key, login=ALICE)
    check(answer, 503, "55P03")
    assert answer.header("Retry-After") == "1"


def test_55P03_of_a_repeat_that_waits_longer_than_it_may(api, database, admin, account, key, thread):
    body = {"account": account, "amount": 1}
    with held(database, account) as holder:
        first = thread.submit(api.post, "create_payment", body, key=key, login=ALICE)
        waiting_for(admin, holder)
        answer = api.post("create_payment", body, key=key, login={**ALICE, "role": "impatient_user"})
        check(answer, 503, "55P03")
        assert answer.header("Retry-After") == "1"
    assert first.result(PATIENCE).status == 201


def test_57014_for_a_request_that_is_cancelled(api, database, admin, account, key, thread):
    body = {"account": account, "amount": 1}
    with held(database, account) as holder:
        first = thread.submit(api.post, "create_payment", body, key=key, login=ALICE)
        admin.execute("SELECT pg_cancel_backend(%s)", [waiting_for(admin, holder)])
        answer = first.result(PATIENCE)
    check(answer, 503, "57014")
    assert answer.header("Retry-After") == "1"
    again = api.post("create_payment", body, key=key, login=ALICE)
    assert (again.status, again.replayed) == (201, False)
