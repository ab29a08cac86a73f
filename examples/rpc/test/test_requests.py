"""What a client gets: first answers, replays, and refusals."""

import base64
import hashlib
import hmac
import json

import pytest

from api import until
from by_http import EXAMPLE, token
from world import ALICE, BOB, STRANGER, balance, make_account, payments, records, runs

JSON = "application/json; charset=utf-8"


class TestAnswers:
    def test_first_request_is_run_and_its_repeat_gets_the_same_answer(self, api, admin, account, key):
        body = {"account": account, "amount": 30}
        first = api.post("create_payment", body, key=key, login=ALICE)
        assert (first.status, first.json()["amount"]) == (201, 30)
        assert first.header("Location") == f"/payments?id=eq.{first.json()['id']}"
        assert first.header("Content-Type") == JSON
        assert first.header("Idempotent-Replayed") is None

        again = api.post("create_payment", body, key=key, login=ALICE)
        assert (again.status, again.body, again.header("Location")) == (201, first.body, first.header("Location"))
        assert again.header("Content-Type") == JSON
        assert again.replayed
        assert (payments(admin, account), balance(admin, account)) == (1, 70)

    def test_402_is_kept_while_the_payment_that_was_written_is_undone(self, api, admin, account, key):
        body = {"account": account, "amount": 500}
        first = api.post("create_payment", body, key=key, login=ALICE)
        assert (first.status, first.json(), first.replayed) == (402, {"error": "not enough money"}, False)
        assert first.header("Location") is None
        assert records(admin, key) == [("errored", 402)]

        admin.execute("UPDATE private.accounts SET balance = 1000 WHERE id = %s", [account])
        again = api.post("create_payment", body, key=key, login=ALICE)
        assert (again.status, again.body, again.replayed) == (402, first.body, True)
        assert (payments(admin, account), balance(admin, account)) == (0, 1000)

    def test_402_is_kept_for_the_time_that_the_handler_says(self, api, admin, account, key):
        api.post("create_payment", {"account": account, "amount": 500}, key=key, login=ALICE)
        kept = admin.execute("SELECT expires_at - finished_at = '30 minutes' FROM idempotency.idempotency_key "
                             "WHERE key = %s", [key]).fetchone()
        assert kept == (True,)

    def test_error_of_a_handler_keeps_nothing_and_a_repeat_runs(self, api, admin, account, key):
        body = {"account": f"{account}-new", "amount": 5}
        missing = api.post("create_payment", body, key=key, login=ALICE)
        assert (missing.status, missing.json()["message"]) == (404, "there is no such account")
        assert records(admin, key) == []

        admin.execute("INSERT INTO private.accounts VALUES ('acme', %s, 100)", [f"{account}-new"])
        again = api.post("create_payment", body, key=key, login=ALICE)
        assert (again.status, again.replayed) == (201, False)

    def test_constraint_that_the_handler_does_not_expect_is_left_to_postgrest(self, api, admin, account, key):
        wrong = api.post("create_payment", {"account": account, "amount": -5}, key=key, login=ALICE)
        assert (wrong.status, wrong.json()["code"]) == (400, "23514")
        assert "amount_is_positive" in wrong.json()["message"]
        assert (records(admin, key), payments(admin, account)) == ([], 0)

    def test_refund_is_given_once(self, api, admin, account, key):
        payment = api.post("create_payment", {"account": account, "amount": 40}, key=key, login=ALICE).json()
        first = api.post("refund", {"payment": payment["id"]}, key=key, login=ALICE)
        assert (first.status, first.json()) == (200, {"refunded": 40})
        again = api.post("refund", {"payment": payment["id"]}, key=key, login=ALICE)
        assert (again.status, again.body, again.replayed) == (200, first.body, True)
        assert balance(admin, account) == 100

        another = api.post("refund", {"payment": payment["id"]}, key=f"{key}-2", login=BOB)
        assert (another.status, another.json(), another.replayed) == (422, {"error": "refunded before"}, False)
        assert balance(admin, account) == 100

    def test_csv_is_replayed_as_csv(self, api, admin, account, key):
        payment = api.post("create_payment", {"account": account, "amount": 7.5}, key=f"{key}-1", login=ALICE).json()
        first = api.post("create_statement", {"account": account}, key=key, login=ALICE)
        assert (first.status, first.body) == (201, f"payment,amount\n{payment['id']},7.5\n".encode())
        assert first.header("Content-Type") == "text/csv; charset=utf-8"
        assert first.header("Content-Disposition").startswith('attachment; filename="statement-')

        api.post("create_payment", {"account": account, "amount": 1}, key=f"{key}-2", login=ALICE)
        again = api.post("create_statement", {"account": account}, key=key, login=ALICE)
        assert (again.status, again.body, again.replayed) == (201, first.body, True)
        assert again.header("Content-Disposition") == first.header("Content-Disposition")
        count = admin.execute("SELECT count(*) FROM private.statements WHERE account = %s", [account]).fetchone()
        assert count == (1,)

    @pytest.mark.parametrize("function", ["scenario", "scenario_bytes"])
    def test_json_is_sent_byte_for_byte(self, api, key, function):
        text = '{"b" :  1,"a":[ ], "big":9007199254740993, "text":"\\u00e4 ä"}'.encode()
        for replayed in (False, True):
            answer = api.post(function, {"do": "answer with a text as it is"}, key=key, login=ALICE)
            assert (answer.status, answer.body, answer.replayed) == (200, text, replayed)
            assert answer.header("Content-Type") == JSON

    def test_bytes_are_sent_as_they_are(self, api, key):
        for replayed in (False, True):
            answer = api.post("scenario_bytes", {"do": "answer bytes"}, key=key, login=ALICE)
            assert (answer.body, answer.replayed) == (b"\x89PNG\r\n\x1a\n\x00\xff", replayed)
            assert answer.header("Content-Type") == "image/png"

    def test_bytes_from_a_function_that_returns_json_are_refused_and_undone(self, api, admin, key):
        answer = api.post("scenario", {"do": "answer bytes"}, key=key, login=ALICE)
        assert (answer.status, answer.json()["code"]) == (500, "39000")
        assert answer.json()["hint"] == "Protect it with private.protect_bytes."
        assert (records(admin, key), runs(admin, key)) == ([], 0)

    @pytest.mark.parametrize("function", ["scenario", "scenario_bytes"])
    def test_204_is_replayed_as_204(self, api, key, function):
        for replayed in (False, True):
            answer = api.post(function, {"do": "answer nothing", "status": 204}, key=key, login=ALICE)
            assert (answer.status, answer.body, answer.replayed) == (204, b"", replayed)

    @pytest.mark.parametrize("function", ["scenario", "scenario_bytes"])
    def test_type_that_the_handler_gives_is_the_only_one(self, api, key, function):
        for replayed in (False, True):
            answer = api.post(function, {"do": "answer with a type of JSON"}, key=key, login=ALICE)
            assert (answer.json(), answer.replayed) == ({"done": True}, replayed)
            assert answer.header("Content-Type") == "application/problem+json"

    def test_answer_of_no_type_is_not_called_json(self, api, key):
        answer = api.post("scenario_bytes", {"do": "answer nothing"}, key=key, login=ALICE)
        assert (answer.status, answer.body) == (200, b"")
        assert answer.header("Content-Type") == "application/octet-stream"

    def test_headers_of_the_answer_are_replayed_and_those_set_aside_are_not(self, api, key):
        for replayed in (False, True):
            answer = api.post("scenario", {"do": "answer with headers"}, key=key, login=ALICE)
            assert (answer.status, answer.replayed) == (200, replayed)
            assert (answer.header("Location"), answer.header("X-Count")) == ("/1", "3")
            assert answer.values("Link") == ["</1>", "</2>"]
            assert answer.header("X-None") is None
            assert answer.header("Set-Cookie") == (None if replayed else "a=1")

    def test_status_that_may_be_tried_again_is_not_kept(self, api, admin, key):
        for count in (1, 2):
            answer = api.post("scenario", {"do": "answer", "status": 503}, key=key, login=ALICE)
            assert (answer.status, answer.json(), answer.replayed) == (503, {"done": True}, False)
            assert (records(admin, key), runs(admin, key)) == ([], count)


class TestKeys:
    @pytest.mark.parametrize("sent", [[], [""], ["  "], ['""']], ids=["none", "empty", "white space", "quotes"])
    def test_missing_key_is_400(self, api, admin, account, sent):
        headers = [("Idempotency-Key", value) for value in sent]
        answer = api.post("create_payment", {"account": account, "amount": 1}, login=ALICE, headers=headers)
        assert (answer.status, answer.json()["code"]) == (400, "ID001")
        assert answer.json()["message"] == "the header Idempotency-Key is missing"
        assert payments(admin, account) == 0

    @pytest.mark.parametrize("sent", ["a b", "ä", "x" * 256], ids=["space", "not ASCII", "too long"])
    def test_malformed_key_is_400(self, api, admin, account, sent):
        answer = api.post("create_payment", {"account": account, "amount": 1}, login=ALICE, key=sent)
        assert (answer.status, answer.json()["code"]) == (400, "ID002")
        assert answer.json()["message"] == "idempotency key is malformed"
        assert payments(admin, account) == 0

    @pytest.mark.parametrize("sent", ["{0}, {0}", "{0},{0}", '"{0}", "{0}"'])
    def test_key_that_a_proxy_joined_of_two_is_400(self, api, admin, account, key, sent):
        answer = api.post("create_payment", {"account": account, "amount": 1}, login=ALICE, key=sent.format(key))
        assert (answer.status, answer.json()["code"]) == (400, "ID002")
        assert answer.json()["message"] == "the header Idempotency-Key was sent more than once"
        assert payments(admin, account) == 0

    def test_of_a_header_sent_twice_postgrest_shows_the_last(self, api, admin, key):
        headers = [("Idempotency-Key", f"{key}-1"), ("idempotency-key", f"{key}-2")]
        answer = api.post("scenario", {"do": "answer"}, login=ALICE, headers=headers)
        assert answer.status == 200
        assert (runs(admin, f"{key}-1"), runs(admin, f"{key}-2")) == (0, 1)

    def test_key_with_and_without_quotes_is_one(self, api, key):
        assert not api.post("scenario", {"do": "answer"}, key=key, login=ALICE).replayed
        assert api.post("scenario", {"do": "answer"}, key=f' "{key}" ', login=ALICE).replayed

    def test_key_belongs_to_an_operation_a_tenant_and_a_user(self, api, admin, key):
        names = [make_account(admin, tenant) for tenant in ("acme", "other")]
        first = api.post("create_payment", {"account": names[0], "amount": 1}, key=key, login=ALICE)
        by_bob = api.post("create_payment", {"account": names[0], "amount": 2}, key=key, login=BOB)
        elsewhere = api.post("create_payment", {"account": names[1], "amount": 3}, key=key, login=STRANGER)
        otherwise = api.post("create_statement", {"account": names[0]}, key=key, login=ALICE)
        assert [answer.status for answer in (first, by_bob, elsewhere, otherwise)] == [201] * 4
        assert not any(answer.replayed for answer in (first, by_bob, elsewhere, otherwise))

    def test_repeat_with_another_body_is_422(self, api, admin, account, key):
        api.post("create_payment", {"account": account, "amount": 1}, key=key, login=ALICE)
        answer = api.post("create_payment", {"account": account, "amount": 2}, key=key, login=ALICE)
        assert (answer.status, answer.json()["code"]) == (422, "ID004")
        assert answer.header("Retry-After") is None
        assert (payments(admin, account), balance(admin, account)) == (1, 99)

    def test_order_and_white_space_of_the_body_do_not_count(self, api, account, key):
        first = api.post("create_payment", f'{{"account": "{account}", "amount": 1}}', key=key, login=ALICE)
        again = api.post("create_payment", f'{{ "amount":1.0,"account":"{account}"}}', key=key, login=ALICE)
        assert (again.status, again.body, again.replayed) == (201, first.body, True)

    def test_numbers_that_a_parser_would_round_are_different(self, api, key):
        first = api.post("scenario", '{"do": "answer", "id": 9007199254740993}', key=key, login=ALICE)
        other = api.post("scenario", '{"do": "answer", "id": 9007199254740992}', key=key, login=ALICE)
        assert (first.status, other.status) == (200, 422)


class TestBodies:
    @pytest.mark.parametrize("body", ["", "{", "[1, 2]", "5", '"text"', "null"])
    def test_body_that_is_no_object_is_400(self, api, admin, key, body):
        assert api.post("scenario", body, key=key, login=ALICE).status == 400
        assert runs(admin, key) == 0

    def test_numbers_are_refused_by_the_wrapper_as_they_all_look_the_same(self, api, key):
        answer = api.post("scenario", "5", key=key, login=ALICE)
        assert answer.json()["message"] == "the body of the request is not a JSON object"

    def test_array_of_objects_is_refused_by_the_wrapper(self, api, key):
        answer = api.post("scenario", '[{"do": "answer"}]', key=key, login=ALICE)
        assert (answer.status, answer.json()["message"]) == (400, "the body of the request is not a JSON object")

    @pytest.mark.parametrize("value, codes", [
        ('"\\u0000"', ["22P05"]), ("1e200000", ["22003"]),
        # half a pair, which PostgREST may refuse by itself
        ('"\\ud800"', ["22P02", "PGRST102"])])
    def test_json_that_the_database_cannot_hold_is_400(self, api, admin, key, value, codes):
        answer = api.post("scenario", f'{{"do": "answer", "value": {value}}}', key=key, login=ALICE)
        assert answer.status == 400
        assert answer.json()["code"] in codes
        assert runs(admin, key) == 0


class TestLogins:
    def test_nobody_is_401(self, api, admin, account, key):
        answer = api.post("create_payment", {"account": account, "amount": 1}, key=key)
        assert (answer.status, answer.json()["code"]) == (401, "42501")
        assert payments(admin, account) == 0

    @pytest.mark.parametrize("name", ["tenant", "sub"])
    @pytest.mark.parametrize("value", [None, ""], ids=["none", "empty"])
    def test_log_in_without_tenant_or_user_is_403(self, api, admin, account, key, name, value):
        login = {field: known for field, known in ALICE.items() if field != name}
        if value is not None:
            login[name] = value
        answer = api.post("create_payment", {"account": account, "amount": 1}, key=key, login=login)
        assert (answer.status, answer.json()["code"]) == (403, "42501")
        assert answer.json()["message"] == f'the log-in has no "{name}"'
        assert payments(admin, account) == 0

    def test_tenant_in_the_body_counts_for_nothing(self, api, admin, account, key):
        body = {"account": account, "amount": 1, "tenant": "acme"}
        answer = api.post("create_payment", body, key=key, login=STRANGER)
        assert (answer.status, answer.json()["message"]) == (404, "there is no such account")
        assert payments(admin, account) == 0


class TestStatus:
    def ask(self, api, key, login=ALICE, action="payments.create"):
        return api.get("request_status", action=action, key=key, login=login)

    def test_answer_that_is_kept(self, api, account, key):
        first = api.post("create_payment", {"account": account, "amount": 1}, key=key, login=ALICE)
        found = self.ask(api, key)
        assert (found.status, found.body, found.replayed) == (201, first.body, True)
        assert (found.header("Location"), found.header("Content-Type")) == (first.header("Location"), JSON)

    def test_answer_that_is_not_json(self, api, account, key):
        first = api.post("create_statement", {"account": account}, key=key, login=ALICE)
        found = self.ask(api, key, action="statements.create")
        assert (found.status, found.body) == (201, first.body)
        assert found.header("Content-Type") == "text/csv; charset=utf-8"

    def test_refusal_that_is_kept(self, api, account, key):
        api.post("create_payment", {"account": account, "amount": 500}, key=key, login=ALICE)
        found = self.ask(api, key)
        assert (found.status, found.json(), found.replayed) == (402, {"error": "not enough money"}, True)

    def test_nothing_is_404_and_claims_nothing(self, api, admin, account, key):
        found = self.ask(api, key)
        assert (found.status, found.json()["message"]) == (404, "nothing is known of this request")
        assert api.post("create_payment", {"account": account, "amount": 1}, key=key, login=ALICE).status == 201

    @pytest.mark.parametrize("login", [BOB, STRANGER], ids=["another user", "another tenant"])
    def test_requests_of_others_are_404(self, api, account, key, login):
        api.post("create_payment", {"account": account, "amount": 1}, key=key, login=ALICE)
        assert self.ask(api, key, login).status == 404

    def test_stalled_lease_is_202(self, api, admin, key):
        admin.execute("SELECT idempotency.idempotency_begin('acme', 'cards.charge', %s, actor => 'alice', "
                      "lease => '1 ms')", [key])
        stalled = "SELECT 1 FROM idempotency.idempotency_stalled WHERE key = %s"
        until(lambda: admin.execute(stalled, [key]).fetchone(), "the lease has run out")
        found = self.ask(api, key, action="cards.charge")
        assert (found.status, found.json()["outcome"]) == (202, "stalled")
        assert int(found.header("Retry-After")) >= 1

    def test_malformed_key_is_400(self, api):
        assert self.ask(api, "a b").json()["code"] == "ID002"
        assert self.ask(api, "a b").status == 400


def test_token_is_one_that_can_be_checked_with_the_secret():
    head, claims, signature = token(ALICE).split(".")
    padded = base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4))
    assert json.loads(padded) == ALICE
    secret = (EXAMPLE / "demo.secret").read_bytes().strip()
    digest = hmac.new(secret, f"{head}.{claims}".encode(), hashlib.sha256).digest()
    assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == signature
