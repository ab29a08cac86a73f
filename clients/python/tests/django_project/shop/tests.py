"""Tests of the shop, as ``manage.py test`` runs them."""

from uuid import uuid4

from django.contrib.auth.models import User
from django.db import connection
from django.test import TestCase, TransactionTestCase
from pg_idempotency import UnfinishedError
from pg_idempotency.django.models import Record

from . import services, tasks
from .models import Order, Payment


class OrderTests(TestCase):
    def setUp(self):
        self.client.force_login(User.objects.create(username="alice"))

    def create(self, key, amount=30):
        order = {"product": "tea", "amount": amount}
        return self.client.post("/orders/", order, content_type="application/json", HTTP_IDEMPOTENCY_KEY=key)

    def test_a_repeat_gets_the_first_answer(self):
        first = self.create("key-1")
        repeat = self.create("key-1")
        self.assertEqual(first.status_code, 201)
        self.assertEqual((repeat.status_code, repeat.content), (first.status_code, first.content))
        self.assertEqual(repeat["Idempotent-Replayed"], "true")
        self.assertEqual(Order.objects.count(), 1)

    def test_another_request_needs_another_key(self):
        self.create("key-1")
        self.assertEqual(self.create("key-1", amount=40).status_code, 422)

    def test_no_hooks_are_there_but_those_of_the_shop(self):
        with self.captureOnCommitCallbacks() as hooks:
            self.create("key-1")
        self.assertEqual(hooks, [])

    def test_an_order_is_cancelled_once(self):
        order = self.create("key-1").json()
        url = f"/orders/{order['id']}/"
        for _ in range(2):
            response = self.client.delete(url, HTTP_IDEMPOTENCY_KEY="key-2")
            self.assertEqual((response.status_code, response.json()), (200, {"cancelled": 1}))
        self.assertEqual(self.client.get(url).status_code, 404)

    def test_a_request_needs_a_key(self):
        response = self.client.post("/orders/", {}, content_type="application/json")
        self.assertEqual((response.status_code, response.json()["code"]), (400, "IDEMPOTENCY_KEY_MISSING"))


class PaymentTests(TestCase):
    def setUp(self):
        alice = User.objects.create(username="alice")
        self.client.force_login(alice)
        self.order = Order.objects.create(buyer=alice, product="tea", amount=30)

    def pay(self, amount=30):
        return self.client.post(
            f"/orders/{self.order.pk}/pay/",
            {"amount": amount},
            content_type="application/json",
            HTTP_IDEMPOTENCY_KEY="key-1",
        )

    def test_a_payment_is_made_once(self):
        first, repeat = self.pay(), self.pay()
        self.assertEqual(first.status_code, 201)
        self.assertEqual(repeat.content, first.content)
        self.assertEqual(Payment.objects.count(), 1)

    def test_a_refusal_is_kept(self):
        self.assertEqual([self.pay(amount=20).status_code for _ in range(2)], [402, 402])
        self.assertEqual(Record.objects.get(key="key-1").state, "errored")

    def test_a_service_that_does_not_finish_is_found_out(self):
        pay, services.pay = services.pay, lambda *args, **kwargs: None
        self.addCleanup(setattr, services, "pay", pay)
        with self.assertRaisesMessage(UnfinishedError, "shop.views.pay_order did not hand over request.idempotency"):
            self.pay()


class TaskTests(TestCase):
    def test_an_order_is_shipped_once(self):
        order = Order.objects.create(buyer=User.objects.create(username="alice"), product="tea", amount=30)
        self.assertEqual([tasks.ship("message-1", order.pk) for _ in range(2)], [False, True])
        self.assertTrue(Order.objects.get().shipped)


class ApiTests(TestCase):
    def setUp(self):
        self.alice = User.objects.create(username="alice")
        self.client.force_login(self.alice)

    def post(self, path, body, key):
        return self.client.post(path, body, content_type="application/json", HTTP_IDEMPOTENCY_KEY=key)

    def test_an_order_is_made_and_paid_once(self):
        made = [self.post("/api/orders/", {"product": "tea", "amount": 30}, "key-1") for _ in range(2)]
        self.assertEqual([response.status_code for response in made], [201, 201])
        order = Order.objects.get()
        paid = [self.post(f"/api/orders/{order.pk}/pay/", {"amount": 30}, "key-1") for _ in range(2)]
        self.assertEqual([response.json()["order"] for response in paid], [order.pk, order.pk])
        self.assertEqual(Payment.objects.count(), 1)


class CommittedOrderTests(TransactionTestCase):
    def setUp(self):
        with connection.cursor() as cursor:
            cursor.execute("TRUNCATE idempotency.idempotency_key")
        self.client.force_login(User.objects.create(username="alice"))

    def test_an_order_is_committed_with_its_answer(self):
        key = str(uuid4())
        order = {"product": "tea", "amount": 30}
        for _ in range(2):
            self.client.post("/orders/", order, content_type="application/json", HTTP_IDEMPOTENCY_KEY=key)
        self.assertEqual(Order.objects.count(), 1)
        self.assertEqual(Record.objects.get().key, key)
