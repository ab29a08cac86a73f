"""Requests at the same time, and requests whose process dies."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from api import until
from world import ALICE, balance, held, payments, records, waiting_for

PATIENT = {**ALICE, "role": "patient_user"}
PATIENCE = 60  # seconds after which a request that does not end is a failure


@pytest.fixture
def threads():
    with ThreadPoolExecutor(12) as pool:
        yield pool


def pay(api, account, key, amount=10):
    return api.post("create_payment", {"account": account, "amount": amount}, key=key, login=ALICE)


def pay_until_answered(api, account, key):
    """As a client does: send it again while it is in flight."""
    answers = []

    def answered():
        answers.append(pay(api, account, key))
        return answers[-1].status != 409

    until(answered, "the request is answered")
    return answers[-1]


def test_repeat_is_told_at_once_that_the_first_is_at_work(api, database, admin, account, key, threads):
    with held(database, account) as holder:
        first = threads.submit(pay, api, account, key)
        waiting_for(admin, holder)

        repeat = api.post("create_payment", {"account": account, "amount": 10}, key=key, login=PATIENT)
        assert (repeat.status, repeat.json()["code"]) == (409, "ID003")
        assert repeat.header("Retry-After") == "90"
        assert repeat.json()["hint"] == "Send it again in 90 s."
        assert not first.done()
    assert first.result(PATIENCE).status == 201
    assert pay(api, account, key).replayed
    assert payments(admin, account) == 1


def test_different_request_is_refused_while_the_first_is_at_work(api, database, admin, account, key, threads):
    with held(database, account) as holder:
        first = threads.submit(pay, api, account, key)
        waiting_for(admin, holder)
        other = pay(api, account, key, amount=11)
        assert (other.status, other.json()["code"]) == (422, "ID004")
    assert first.result(PATIENCE).status == 201


def test_status_of_a_request_at_work_is_202(api, database, admin, account, key, threads):
    with held(database, account) as holder:
        first = threads.submit(pay, api, account, key)
        waiting_for(admin, holder)
        found = api.get("request_status", action="payments.create", key=key, login=PATIENT)
        assert (found.status, found.json()["outcome"], found.replayed) == (202, "in_flight", False)
        assert found.header("Retry-After") == "90"
    assert first.result(PATIENCE).status == 201


def test_nine_repeats_of_a_request_at_work_are_one_payment(api, database, admin, account, key, threads):
    with held(database, account) as holder:
        first = threads.submit(pay, api, account, key)
        waiting_for(admin, holder)
        repeats = [threads.submit(pay, api, account, key) for _ in range(9)]
        assert {repeat.result(PATIENCE).status for repeat in repeats} == {409}
    assert first.result(PATIENCE).status == 201
    assert (payments(admin, account), balance(admin, account)) == (1, 90)


def test_ten_at_once_are_one_payment_and_one_answer(api, admin, account, key, threads):
    asked = [threads.submit(pay_until_answered, api, account, key) for _ in range(10)]
    answers = [future.result(PATIENCE) for future in asked]
    assert [answer.status for answer in answers] == [201] * 10
    assert len({answer.body for answer in answers}) == 1
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 9
    assert (payments(admin, account), balance(admin, account)) == (1, 90)


def test_request_whose_process_dies_leaves_nothing_and_its_repeat_runs(api, database, admin, account, key, threads):
    with held(database, account) as holder:
        first = threads.submit(pay, api, account, key)
        pid = waiting_for(admin, holder)
        assert payments(admin, account) == 0
        admin.execute("SELECT pg_terminate_backend(%s)", [pid])
        assert first.result(PATIENCE).status == 503
    assert (records(admin, key), payments(admin, account), balance(admin, account)) == ([], 0, 100)

    again = pay(api, account, key)
    assert (again.status, again.replayed) == (201, False)
    assert (records(admin, key), payments(admin, account), balance(admin, account)) == ([("completed", 201)], 1, 90)
