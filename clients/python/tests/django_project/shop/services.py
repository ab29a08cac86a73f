"""What the shop does, whoever asks for it."""

from pg_idempotency import Refusal

from .models import Order, Payment


def pay(order_id, amount, *, idempotency):
    order = Order.objects.select_for_update().get(pk=order_id)
    if amount != order.amount:
        raise Refusal(402, {"error": f"the order costs {order.amount}"})
    payment = Payment.objects.create(order=order, amount=amount)
    idempotency.finish(201, {"id": payment.pk, "order": order.pk})
