"""Where everything is."""

from django.contrib import admin
from django.urls import include, path
from rest_framework.routers import DefaultRouter

from . import api, views

router = DefaultRouter()
router.register("orders", api.OrderViewSet)

urlpatterns = [
    path("admin/", admin.site.urls),
    path("orders/", views.create_order),
    path("orders/<int:order_id>/", views.OrderView.as_view()),
    path("orders/<int:order_id>/pay/", views.pay_order),
    path("api/orders/<int:order_id>/pay/", api.pay_order),
    path("api/", include(router.urls)),
]
