"""The shop over HTTP."""

import json

from django.contrib.auth.decorators import login_required
from django.http import JsonResponse
from django.shortcuts import get_object_or_404
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.csrf import csrf_exempt
from pg_idempotency.django import IdempotentViewMixin, idempotent_view

from . import services
from .models import Order


@csrf_exempt
@login_required
@idempotent_view
def create_order(request):
    wanted = json.loads(request.body)
    order = Order.objects.create(buyer=request.user, product=wanted["product"], amount=wanted["amount"])
    response = JsonResponse({"id": order.pk}, status=201)
    response["Location"] = f"/orders/{order.pk}/"
    return response


@csrf_exempt
@login_required
@idempotent_view(action="orders.pay", finished_by="service", ttl={"2xx": "48 h", 402: "30 min"})
def pay_order(request, order_id):
    wanted = json.loads(request.body)
    services.pay(order_id, wanted["amount"], idempotency=request.idempotency)


@method_decorator([csrf_exempt, login_required], name="dispatch")
class OrderView(IdempotentViewMixin, View):
    idempotency_options = {"required": False}

    def get(self, request, order_id):
        order = get_object_or_404(Order, pk=order_id, buyer=request.user)
        return JsonResponse({"product": order.product, "amount": order.amount})

    def delete(self, request, order_id):
        cancelled, _ = Order.objects.filter(pk=order_id, buyer=request.user).delete()
        return JsonResponse({"cancelled": cancelled})
