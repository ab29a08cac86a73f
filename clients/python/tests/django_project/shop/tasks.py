"""What is done outside of requests."""

from pg_idempotency import Scope
from pg_idempotency.django import idempotent

from .models import Order


def ship(message_id, order_id):
    scope = Scope(action="orders.ship", key=message_id)
    with idempotent(scope, {"order": order_id}) as claim:
        if not claim.replayed:
            Order.objects.filter(pk=order_id).update(shipped=True)
            claim.finish(204)
    return claim.answer.replayed
