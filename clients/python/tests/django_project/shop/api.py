"""The shop with REST framework."""

from pg_idempotency.django import IdempotentViewMixin, idempotent_view
from rest_framework import serializers, viewsets
from rest_framework.decorators import api_view, permission_classes
from rest_framework.permissions import IsAuthenticated

from . import services
from .models import Order


@api_view(["POST"])
@permission_classes([IsAuthenticated])
@idempotent_view(finished_by="service")
def pay_order(request, order_id):
    services.pay(order_id, request.data["amount"], idempotency=request.idempotency)


class OrderSerializer(serializers.ModelSerializer):
    class Meta:
        model = Order
        fields = ["id", "product", "amount"]


class OrderViewSet(IdempotentViewMixin, viewsets.ModelViewSet):
    queryset = Order.objects.order_by("pk")
    serializer_class = OrderSerializer
    permission_classes = [IsAuthenticated]

    def perform_create(self, serializer):
        serializer.save(buyer=self.request.user)
