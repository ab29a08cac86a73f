"""Whose a request is."""


def actor_of(request):
    return request.user.pk
