"""What the shop keeps."""

from django.db import models


class Order(models.Model):
    product = models.TextField()
    amount = models.IntegerField()
    buyer = models.ForeignKey("auth.User", models.CASCADE)
    shipped = models.BooleanField(default=False)


class Payment(models.Model):
    order = models.ForeignKey(Order, models.CASCADE)
    amount = models.IntegerField()
