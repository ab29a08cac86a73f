"""A small shop: what django.md shows is in here, and so is run by the tests."""
