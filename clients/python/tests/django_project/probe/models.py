"""What the views of tests write."""

from django.db import models


class Row(models.Model):
    text = models.TextField()
