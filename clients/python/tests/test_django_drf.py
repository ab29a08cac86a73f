"""Protected views of REST framework."""

from __future__ import annotations

from typing import Any

# first, since it sets Django up
from django_project.fixtures import (
    MARKER,
    atomic_requests,
    key,
    project,
    protect,
    quiet,
    send,
    serve,
    tenant_of,
)

import pytest  # isort: skip
from django.contrib.auth.models import User
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection, transaction
from django.http import HttpResponse
from django.test.client import encode_multipart
from django.urls import include, path
from pg_idempotency import Refusal, UnfinishedError
from pg_idempotency.django import IdempotentViewMixin, idempotent_view
from probe.models import Row
from rest_framework import exceptions, serializers, viewsets
from rest_framework.authentication import BaseAuthentication
from rest_framework.decorators import action, api_view, authentication_classes, permission_classes
from rest_framework.permissions import BasePermission, IsAuthenticated
from rest_framework.renderers import JSONRenderer, StaticHTMLRenderer
from rest_framework.response import Response
from rest_framework.routers import DefaultRouter
from rest_framework.views import APIView, exception_handler

# fixtures that are used by their names
__all__ = ["atomic_requests", "key", "project", "serve"]

pytestmark = pytest.mark.usefixtures("project")


def rows(key: str) -> int:
    return Row.objects.filter(text=key).count()


def records(project: Any, key: str) -> list[Any]:
    return project.query(
        "SELECT actor, action, state::text, status_code FROM idempotency.idempotency_key WHERE key = %s", key
    )


class ByHeader(BaseAuthentication):
    """Whoever says a name is logged in by it."""

    def authenticate(self, request: Any) -> Any:
        name = request.headers.get("X-User")
        return (User(username=name, pk=len(name)), None) if name else None

    def authenticate_header(self, request: Any) -> str:
        return "X-User"


def view_of(work: Any, **options: Any) -> Any:
    """A function below ``@api_view``, which writes a row before its work."""

    @api_view(["POST", "PUT"])
    @protect(**options)
    def view(request, **params):
        Row.objects.create(text=request.idempotency.key)
        return work(request, **params)

    return view


def test_below_api_view_the_answer_is_rendered_and_kept(project, serve, key, atomic_requests):
    calls = []

    def work(request):
        calls.append(request.data["amount"])
        answer = {"amount": request.data["amount"], "inside": connection.in_atomic_block}
        return Response(answer, 201, headers={"Location": "/1/"})

    serve(view_of(work))
    first, repeat = send(key, {"amount": 30}), send(key, {"amount": 30})
    assert (first.status_code, first.content) == (201, b'{"amount":30,"inside":true}')
    assert (repeat.status_code, repeat.content, repeat[MARKER]) == (201, first.content, "true")
    assert (repeat["Location"], repeat["Content-Type"]) == ("/1/", "application/json")
    assert first.data == {"amount": 30, "inside": True}
    assert (calls, rows(key)) == ([30], 1)
    assert send(key, {"amount": 31}).status_code == 422


def test_the_answer_is_rendered_by_what_was_asked_for(serve, key):
    @api_view(["POST"])
    @protect
    def view(request):
        return Response("<p>hello</p>")

    view.cls.renderer_classes = [JSONRenderer, StaticHTMLRenderer]
    serve(view)
    first, repeat = send(key, Accept="text/html"), send(key, Accept="text/html")
    assert first.content == repeat.content == b"<p>hello</p>"
    assert repeat["Content-Type"] == first["Content-Type"] == "text/html; charset=utf-8"


def test_the_answer_is_rendered_inside_of_the_transaction(serve, key):
    inside = []

    class Looks(JSONRenderer):
        def render(self, *args: Any, **kwargs: Any) -> bytes:
            inside.append(connection.in_atomic_block)
            return super().render(*args, **kwargs)

    view = view_of(lambda request: Response({}))
    view.cls.renderer_classes = [Looks]
    serve(view)
    send(key)
    assert inside == [True]


def test_an_ordinary_response_may_be_returned_as_well(serve, key):
    serve(view_of(lambda request: HttpResponse(b"x", content_type="text/plain")))
    assert send(key).content == send(key).content == b"x"


def test_the_user_is_the_one_that_rest_framework_knows(project, serve, key):
    @api_view(["POST"])
    @authentication_classes([ByHeader])
    @permission_classes([IsAuthenticated])
    @idempotent_view(actor=lambda request: request.user.username)
    def view(request):
        return Response({"user": request.user.username})

    serve(view)
    for name in ("alice", "bob"):
        assert send(key, X_User=name).json() == send(key, X_User=name).json() == {"user": name}
    assert {record[0] for record in records(project, key)} == {"alice", "bob"}
    # who is not logged in gets no answer of anybody
    assert send(key).status_code == 401


def test_above_api_view_the_decorator_is_refused():
    @api_view(["POST"])
    def view(request):
        return Response()

    with pytest.raises(TypeError, match="put @idempotent_view below @api_view"):
        protect(view)


@pytest.mark.parametrize(
    "error, status",
    [(exceptions.NotFound(), 404), (exceptions.ValidationError({"amount": ["too small"]}), 400)],
    ids=["404", "400"],
)
def test_the_response_to_an_exception_is_kept(project, serve, key, error, status, atomic_requests):
    calls = []

    def work(request):
        calls.append(1)
        raise error

    serve(view_of(work))
    first, repeat = send(key), send(key)
    assert (first.status_code, repeat.status_code) == (status, status)
    assert (repeat.content, repeat[MARKER]) == (first.content, "true")
    assert (len(calls), rows(key), records(project, key)[0][2:]) == (1, 0, ("errored", status))
    assert not connection.in_atomic_block


def test_the_response_to_an_exception_that_a_repeat_may_change_is_not_kept(project, serve, key):
    def work(request):
        raise exceptions.Throttled(wait=7)

    serve(view_of(work))
    response = send(key)
    assert (response.status_code, response["Retry-After"]) == (429, "7")
    assert (rows(key), records(project, key)) == (0, [])


def test_what_rest_framework_does_not_know_is_passed_on(project, serve, key):
    def work(request):
        raise RuntimeError("x")

    serve(view_of(work))
    with pytest.raises(RuntimeError, match="x"):
        send(key)
    assert (rows(key), records(project, key)) == (0, [])


class DomainError(Exception):
    """What a service raises."""


def every_exception(error: Exception, context: Any) -> Any:
    """A handler that makes a response of everything."""
    if isinstance(error, DomainError):
        return Response({"error": str(error)}, 409 if str(error) == "again" else 422)
    return exception_handler(error, context) or Response({"error": "internal"}, 500)


def test_an_exception_of_the_service_is_answered_by_its_own_handler(project, serve, key, monkeypatch):
    def work(request):
        raise DomainError("money")

    view = view_of(work)
    monkeypatch.setattr(view.cls, "get_exception_handler", lambda self: every_exception)
    serve(view)
    first, repeat = send(key), send(key)
    assert (first.status_code, first.content, repeat.content) == (422, b'{"error":"money"}', first.content)
    assert (repeat[MARKER], rows(key)) == ("true", 0)


def test_a_handler_for_everything_does_not_hide_a_conflict(serve, key, monkeypatch):
    calls = []

    def work(request):
        calls.append(1)
        if len(calls) == 1:
            with connection.cursor() as cursor:
                cursor.execute("DO $$ BEGIN RAISE 'made' USING ERRCODE = '40001'; END $$")
        return Response({"call": len(calls)})

    view = view_of(work)
    monkeypatch.setattr(view.cls, "get_exception_handler", lambda self: every_exception)
    serve(view)
    assert send(key).json() == {"call": 2}
    assert rows(key) == 1


def test_a_handler_for_everything_does_not_hide_that_the_connection_was_lost(project, serve, key, monkeypatch):
    calls = []

    def work(request):
        calls.append(1)
        if len(calls) == 1:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                project.query("SELECT pg_terminate_backend(%s, 10000)", cursor.fetchone()[0])
            Row.objects.count()
        return Response({"call": len(calls)})

    view = view_of(work)
    monkeypatch.setattr(view.cls, "get_exception_handler", lambda self: every_exception)
    serve(view)
    response = send(key)
    assert (response.status_code, response.json()["code"]) == (503, "DATABASE_UNAVAILABLE")
    assert (send(key).json(), rows(key)) == ({"call": 2}, 1)


def test_a_problem_is_not_for_the_handler(serve, key, monkeypatch):
    view = view_of(lambda request: Response({}), mismatch_status=409)
    monkeypatch.setattr(view.cls, "get_exception_handler", lambda self: every_exception)
    serve(view)
    send(key, {"a": 1})
    response = send(key, {"a": 2})
    assert (response.status_code, response["Content-Type"]) == (409, "application/problem+json")
    assert response.json()["code"] == "IDEMPOTENCY_KEY_REUSED"


def test_a_refusal_is_not_for_the_handler(serve, key, monkeypatch):
    def work(request):
        raise Refusal(402, {"error": "money"})

    view = view_of(work)
    monkeypatch.setattr(view.cls, "get_exception_handler", lambda self: every_exception)
    serve(view)
    assert send(key).content == send(key).content == b'{"error":"money"}'
    assert rows(key) == 0


def test_a_service_says_what_the_answer_is(project, serve, key, atomic_requests):
    serve(view_of(lambda request: request.idempotency.finish(201, {"id": 7}), finished_by="service"))
    first, repeat = send(key), send(key)
    assert (first.status_code, first.content) == (repeat.status_code, repeat.content) == (201, b'{"id":7}')
    assert (MARKER in first, repeat[MARKER], rows(key)) == (False, "true", 1)


def test_a_view_that_does_not_hand_over_cannot_commit(project, serve, key, atomic_requests):
    serve(view_of(lambda request: Response({}), finished_by="service"))
    with pytest.raises(UnfinishedError, match="view did not hand over request.idempotency") as raised:
        send(key)
    assert (raised.value.sqlstate, rows(key), records(project, key)) == ("ID006", 0, [])
    assert send(key, client=quiet()).json()["code"] == "IDEMPOTENCY_UNFINISHED"


class ReadsTheBody(BasePermission):
    """A permission that depends on the body."""

    def has_permission(self, request: Any, view: Any) -> bool:
        return request.data["amount"] > 0


def test_a_permission_may_read_the_body_before(serve, key):
    view = view_of(lambda request: Response(request.data))
    view.cls.permission_classes = [ReadsTheBody]
    serve(view)
    assert send(key, {"amount": 1}).json() == {"amount": 1}
    assert send(key, {"amount": 2}).status_code == 422
    assert send(key, {"amount": 0}).status_code == 403


@pytest.mark.parametrize("method", ["post", "put"])
def test_of_a_form_its_fields_and_files_count(serve, key, method):
    def work(request):
        return Response({"name": request.data["name"], "file": request.FILES["file"].read().decode()})

    def form(name: str, content: bytes, boundary: str) -> dict[str, Any]:
        fields = {"name": name, "file": SimpleUploadedFile("a.txt", content, "text/plain")}
        return {
            "body": encode_multipart(boundary, fields),
            "content_type": f"multipart/form-data; boundary={boundary}",
            "method": method,
        }

    serve(view_of(work))
    assert send(key, **form("x", b"abc", "one")).json() == {"name": "x", "file": "abc"}
    assert send(key, **form("x", b"abc", "two"))[MARKER] == "true"
    assert send(key, **form("x", b"abd", "two")).status_code == 422
    assert send(key, **form("y", b"abc", "two")).status_code == 422


def test_a_form_that_cannot_be_read_is_answered_by_rest_framework(project, serve, key):
    serve(view_of(lambda request: Response({})))
    assert send(key, "x", content_type="multipart/form-data").status_code == 400
    assert records(project, key) == []


#
# Classes
#


class RowSerializer(serializers.ModelSerializer):
    class Meta:
        model = Row
        fields = ["id", "text"]


class Rows(IdempotentViewMixin, viewsets.ModelViewSet):
    idempotency_options = {"tenant": tenant_of, "actor": None}
    queryset = Row.objects.all()
    serializer_class = RowSerializer
    authentication_classes = [ByHeader]
    permission_classes = [IsAuthenticated]

    @action(detail=True, methods=["post"])
    def double(self, request, pk):
        row = self.get_object()
        row.text += row.text
        row.save()
        return Response(RowSerializer(row).data)


@pytest.fixture
def view_set(serve):
    router = DefaultRouter()
    router.register("rows", Rows)
    serve(path("", include(router.urls)))


def test_a_view_set_is_protected(project, view_set, key, atomic_requests):
    first, repeat = (send(key, {"text": "ab"}, "/rows/", X_User="alice") for _ in range(2))
    assert (first.status_code, first.json()["text"]) == (201, "ab")
    assert (repeat.status_code, repeat.content, repeat[MARKER]) == (201, first.content, "true")
    id = first.json()["id"]
    for _ in range(2):
        assert send(key, url=f"/rows/{id}/double/", X_User="alice").json()["text"] == "abab"
    for _ in range(2):
        assert send(key, url=f"/rows/{id}/", method="delete", X_User="alice").status_code == 204
    assert not Row.objects.filter(pk=id).exists()
    assert sorted(record[3] for record in records(project, key)) == [200, 201, 204]


def test_a_stranger_is_sent_away_before_anything_is_begun(project, view_set, key):
    assert send(key, {"text": key}, "/rows/").status_code == 401
    assert send(None, {"text": key}, "/rows/").status_code == 400
    assert (rows(key), records(project, key)) == (0, [])


def test_what_is_not_valid_is_kept(project, view_set, key):
    first, repeat = (send(key, {}, "/rows/", X_User="alice") for _ in range(2))
    assert (first.status_code, repeat.content, repeat[MARKER]) == (400, first.content, "true")


def test_a_row_that_is_not_there_is_kept_for_its_time(project, view_set, key):
    assert [send(key, {}, "/rows/0/double/", X_User="alice").status_code for _ in range(2)] == [404, 404]
    assert records(project, key)[0][2:] == ("errored", 404)


def test_a_view_is_protected_and_named(serve, key):
    class Forgets(IdempotentViewMixin, APIView):
        idempotency_options = {"tenant": None, "actor": None, "finished_by": "service"}

        def post(self, request):
            if request.data.get("finish"):
                request.idempotency.finish(200, {"text": "done"})
            return Response({"text": "view"})

    serve(Forgets.as_view())
    assert send(key, {"finish": True}).content == send(key, {"finish": True}).content == b'{"text":"done"}'
    with pytest.raises(UnfinishedError, match=r"Forgets\.post did not hand over"):
        send(f"{key}-2")


def test_hooks_run_after_the_commit(project, serve, key, atomic_requests):
    seen = []

    def work(request):
        transaction.on_commit(lambda: seen.append(records(project, key)[0][2]))
        return Response({})

    serve(view_of(work))
    send(key)
    assert seen == ["completed"]
