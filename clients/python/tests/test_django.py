"""Protected views of Django, through its test client and a real server."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

# first, since it sets Django up
from django_project.fixtures import (
    MARKER,
    alias_of,
    atomic_requests,
    key,
    project,
    protect,
    quiet,
    send,
    serve,
    server,
    tenant_of,
)

import django  # isort: skip
import pytest
from django.contrib.auth.mixins import LoginRequiredMixin
from django.contrib.auth.models import AnonymousUser, User
from django.core.exceptions import ImproperlyConfigured
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.signals import got_request_exception
from django.db import connection, connections, transaction
from django.http import Http404, HttpResponse, HttpResponseRedirect, JsonResponse, StreamingHttpResponse
from django.template import engines
from django.template.response import TemplateResponse
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.test.client import encode_multipart
from django.urls import path, re_path
from django.views import View
from django.views.decorators.csrf import csrf_exempt
from pg_idempotency import (
    AnswerTooLargeError,
    InFlightError,
    OutOfOrderError,
    Refusal,
    RolledBackError,
    UnfinishedError,
)
from pg_idempotency.django import IdempotentViewMixin, idempotent_view
from probe.models import Row
from proxy import CutProxy, before_answer, before_statement
from support import created_database, until

# fixtures that are used by their names
__all__ = ["atomic_requests", "key", "project", "serve", "server"]

pytestmark = pytest.mark.usefixtures("project")


class Calls:
    """A view that writes a row, counts, and then does what a test wants."""

    def __init__(self, then: Any = None, **options: Any) -> None:
        self.count = 0
        self._then = then or (lambda request, **params: JsonResponse({"call": self.count}, status=201))
        self.view = protect(self._work, **options)

    def _work(self, request: Any, *args: Any, **params: Any) -> Any:
        self.count += 1
        with transaction.atomic():
            Row.objects.create(text=request.idempotency.key if request.idempotency else "")
        return self._then(request, *args, **params)

    def rows(self, key: str) -> int:
        return Row.objects.filter(text=key).count()


def records(project: Any, key: str) -> list[Any]:
    return project.query(
        "SELECT tenant, actor, action, state::text, status_code FROM idempotency.idempotency_key WHERE key = %s", key
    )


#
# Answers and replays
#


def test_a_repeat_gets_the_first_answer_and_the_view_is_not_called(project, serve, key, atomic_requests):
    def respond(request):
        response = HttpResponse(b'{"amount":  9007199254740993}', content_type="application/json", status=201)
        response["Location"] = "/orders/1/"
        response["X-Elsewhere"] = "yes"
        response.set_cookie("seen", "1")
        return response

    calls = Calls(respond)
    serve(calls.view)
    first, repeat = send(key), send(key)
    assert (first.status_code, first.content) == (201, b'{"amount":  9007199254740993}')
    assert (repeat.status_code, repeat.content) == (first.status_code, first.content)
    assert (repeat["Content-Type"], repeat["Location"], repeat[MARKER]) == ("application/json", "/orders/1/", "true")
    assert MARKER not in first
    assert (calls.count, calls.rows(key)) == (1, 1)
    assert records(project, key) == [("acme", "", "POST /", "completed", 201)]
    # what belongs to the first response alone
    assert first["X-Elsewhere"] == "yes" and "seen" in first.cookies
    assert "X-Elsewhere" not in repeat and not repeat.cookies


def test_headers_that_the_service_names_are_kept(serve, key):
    def respond(request):
        response = HttpResponse(status=204)
        response["X-Balance"] = "70"
        return response

    serve(Calls(respond, replay_headers=["X-Balance"], marker="X-Again").view)
    send(key)
    repeat = send(key)
    assert (repeat.status_code, repeat.content, repeat["X-Balance"], repeat["X-Again"]) == (204, b"", "70", "true")


def test_an_answer_that_is_not_json_is_replayed_byte_for_byte(serve, key):
    serve(Calls(lambda request: HttpResponse(b"\x00\xff<p>", content_type="application/octet-stream")).view)
    first, repeat = send(key), send(key)
    assert repeat.content == first.content == b"\x00\xff<p>"
    assert repeat["Content-Type"] == "application/octet-stream"
    assert repeat[MARKER] == "true"


def test_a_redirect_is_replayed(serve, key):
    serve(Calls(lambda request: HttpResponseRedirect("/thanks/")).view)
    send(key)
    repeat = send(key)
    assert (repeat.status_code, repeat["Location"], repeat[MARKER]) == (302, "/thanks/", "true")


def test_a_template_is_rendered_inside_the_transaction(serve, key):
    inside = []
    template = engines["django"].from_string("{{ note }} {{ count }}")

    def respond(request):
        def note():
            inside.append(connection.in_atomic_block)
            return "rendered"

        return TemplateResponse(request, template, {"note": note, "count": calls.count})

    calls = Calls(respond)
    serve(calls.view)
    first, repeat = send(key), send(key)
    assert first.content == repeat.content == b"rendered 1"
    assert inside == [True]


def test_a_stream_is_collected(serve, key):
    serve(Calls(lambda request: StreamingHttpResponse(iter([b"a", b"b", b"c"]), content_type="text/plain")).view)
    first, repeat = send(key), send(key)
    assert b"".join(first.streaming_content) == repeat.content == b"abc"


@pytest.mark.parametrize("response", [HttpResponse, lambda body: StreamingHttpResponse([body[:5], body[5:]])])
def test_an_answer_that_is_too_large_is_not_given(project, serve, key, response):
    calls = Calls(lambda request: response(b"0123456789"), max_answer=9)
    serve(calls.view)
    with pytest.raises(AnswerTooLargeError):
        send(key)
    assert (calls.rows(key), records(project, key)) == (0, [])


def test_an_answer_of_the_largest_size_is_kept(project, serve, key):
    serve(Calls(lambda request: HttpResponse(b"0123456789"), max_answer=10).view)
    assert send(key).content == b"0123456789"
    assert len(records(project, key)) == 1


@pytest.mark.skipif(django.VERSION < (4, 2), reason="this version has no asynchronous streams")
def test_an_asynchronous_stream_is_refused(serve, key):
    async def stream():
        yield b"a"

    serve(Calls(lambda request: StreamingHttpResponse(stream())).view)
    with pytest.raises(OutOfOrderError, match="asynchronous stream cannot be kept"):
        send(key)


def test_how_long_an_answer_is_kept_depends_on_its_status(project, serve, key):
    serve(Calls(lambda request: JsonResponse({}, status=404), ttl={404: "10 minutes", "2xx": "48 h"}).view)
    send(key)
    (kept,) = project.query(
        "SELECT expires_at - finished_at = '10 minutes' FROM idempotency.idempotency_key WHERE key = %s", key
    )
    assert kept == (True,)


#
# Keys
#


@pytest.mark.parametrize("sent", [None, "", "  ", '""'])
def test_a_missing_key_is_answered_with_400(serve, sent):
    calls = Calls()
    serve(calls.view)
    response = send(sent)
    assert (response.status_code, response["Content-Type"]) == (400, "application/problem+json")
    assert (response.json()["code"], response.json()["status"]) == ("IDEMPOTENCY_KEY_MISSING", 400)
    assert calls.count == 0


@pytest.mark.parametrize("sent", ["with space", "k\u00e9y", "x" * 256, "one,two", "one, two"])
def test_a_malformed_key_is_answered_with_400(serve, sent):
    calls = Calls()
    serve(calls.view)
    response = send(sent)
    assert (response.status_code, response.json()["code"]) == (400, "IDEMPOTENCY_KEY_INVALID")
    assert calls.count == 0


def test_a_key_in_quotes_is_the_same_key(serve, key):
    calls = Calls()
    serve(calls.view)
    assert send(key).content == send(f'"{key}"').content
    assert calls.count == 1


def test_a_key_may_be_optional(project, serve, key, atomic_requests):
    blocks = []

    def respond(request):
        blocks.append((request.idempotency_key, request.idempotency is None, connection.in_atomic_block))
        return JsonResponse({})

    calls = Calls(respond, required=False)
    serve(calls.view)
    send(), send(), send(key), send(key)
    # without a key it is called as without us, with the transaction that ATOMIC_REQUESTS wants
    assert blocks == [(None, True, atomic_requests), (None, True, atomic_requests), (key, False, True)]


def test_what_a_view_without_a_key_raises_rolls_back_with_atomic_requests(serve, atomic_requests):
    Row.objects.filter(text="").delete()

    def respond(request):
        raise Http404

    calls = Calls(respond, required=False)
    serve(calls.view)
    assert send().status_code == 404
    assert calls.rows("") == (0 if atomic_requests else 1)


@pytest.mark.parametrize("method", ["get", "head", "options"])
def test_safe_methods_are_not_protected(project, serve, key, method):
    calls = Calls(lambda request: JsonResponse({"key": request.idempotency_key}))
    serve(calls.view)
    client = Client()
    for _ in range(2):
        assert getattr(client, method)("/", HTTP_IDEMPOTENCY_KEY=key).status_code == 200
    assert (calls.count, records(project, key)) == (2, [])


@pytest.mark.parametrize("method", ["put", "patch", "delete"])
def test_other_methods_are_protected(project, serve, key, method):
    calls = Calls()
    serve(calls.view)
    assert send(key, method=method).content == send(key, method=method).content
    assert (calls.count, records(project, key)[0][2]) == (1, f"{method.upper()} /")


def test_a_view_may_take_its_key_from_another_header_and_in_another_form(serve):
    calls = Calls(header="X-Request-Key", key_format="uuid")
    serve(calls.view)
    assert send(X_Request_Key="not-a-uuid").status_code == 400
    assert send(X_Request_Key="0b1f6d4e-93e0-4b06-8b3e-0a9b5d1f2c3d").status_code == 201
    assert send("key").status_code == 400


def test_the_middleware_takes_the_key_of_views_that_are_not_protected(serve, key):
    serve(csrf_exempt(lambda request: HttpResponse(repr(request.idempotency_key))))
    assert send(key).content == repr(key).encode()
    assert send(None).content == b"None"
    assert send("with space").status_code == 400
    assert Client().get("/", HTTP_IDEMPOTENCY_KEY="with space").content == b"None"


def test_where_no_view_is_there_is_no_key(serve, key):
    seen = []
    middleware = "test_django.SeesTheKey"
    SeesTheKey.seen = seen
    serve(MIDDLEWARE=[middleware, "pg_idempotency.django.middleware.IdempotencyMiddleware"])
    assert send(key, url="/nowhere").status_code == 404
    assert seen == [None]


class SeesTheKey:
    """A middleware that looks at the key when all is over."""

    seen: list[Any]

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        response = self.get_response(request)
        self.seen.append(request.idempotency_key)
        return response


def test_a_key_that_is_sent_twice_is_answered_with_400(serve, server, key):
    calls = Calls()
    serve(calls.view)
    client = http.client.HTTPConnection(*server)
    client.putrequest("POST", "/")
    for value in (key, "another"):
        client.putheader("Idempotency-Key", value)
    client.putheader("Content-Length", "0")
    client.endheaders()
    response = client.getresponse()
    assert (response.status, json.load(response)["code"]) == (400, "IDEMPOTENCY_KEY_INVALID")
    assert calls.count == 0
    client.close()


def test_the_decorator_needs_no_middleware_for_a_request_from_a_factory(project, key):
    calls = Calls()
    request = RequestFactory().post("/orders/", {}, content_type="application/json", HTTP_IDEMPOTENCY_KEY=key)
    assert json.loads(calls.view(request).content) == {"call": 1}
    assert records(project, key)[0][2] == "POST /orders/"


#
# Fingerprints
#


@pytest.mark.parametrize(
    "first, second",
    [
        ({"body": '{"amount": 9007199254740993}'}, {"body": '{"amount": 9007199254740992}'}),
        ({"url": "/7/"}, {"url": "/8/"}),
        ({"url": "/7/?a=1"}, {"url": "/7/?a=2"}),
        ({"url": "/7/?a=1&a=2"}, {"url": "/7/?a=2&a=1"}),
        ({"body": "a=1", "content_type": "text/plain"}, {"body": "a=2", "content_type": "text/plain"}),
        ({"body": "a=1", "content_type": "text/plain"}, {"body": "a=1", "content_type": "text/html"}),
        ({"body": "a=1", "content_type": "application/x-www-form-urlencoded"},
         {"body": "a=2", "content_type": "application/x-www-form-urlencoded"}),
    ],
    ids=["number", "path", "query", "order of a query", "body", "content type", "form"],
)  # fmt: skip
def test_a_different_request_under_the_same_key_is_answered_with_422(serve, key, first, second):
    calls = Calls()
    serve(path("<int:id>/", calls.view))
    assert send(key, **{"url": "/7/", **first}).status_code == 201
    response = send(key, **{"url": "/7/", **second})
    assert (response.status_code, response.json()["code"]) == (422, "IDEMPOTENCY_KEY_REUSED")
    assert calls.count == 1


def test_json_may_be_written_in_another_way(serve, key):
    calls = Calls()
    serve(calls.view)
    send(key, '{"a": 1, "b": 2}')
    assert send(key, '{"b":2,"a":1}')[MARKER] == "true"


def test_what_does_not_count_is_left_out(serve, key):
    calls = Calls(omit=["body.sent_at"])
    serve(calls.view)
    send(key, {"a": 1, "sent_at": 1})
    assert send(key, {"a": 1, "sent_at": 2})[MARKER] == "true"
    assert send(key, {"a": 2, "sent_at": 2}).status_code == 422


def test_a_mismatch_may_be_answered_with_409(serve, key):
    calls = Calls(mismatch_status=409, problem=lambda problem: ("application/json", {"error": problem.code}))
    serve(calls.view)
    send(key, {"a": 1})
    response = send(key, {"a": 2})
    assert (response.status_code, response.json()) == (409, {"error": "IDEMPOTENCY_KEY_REUSED"})


@pytest.mark.parametrize("body", ["{", "NaN", '{"a": "\\u0000"}', b'"\xff"', "1, 2"])
def test_json_that_cannot_be_read_is_answered_with_400(project, serve, key, body):
    calls = Calls()
    serve(calls.view)
    response = send(key, body)
    assert (response.status_code, response.json()["code"]) == (400, "REQUEST_INVALID")
    assert (calls.count, records(project, key)) == (0, [])


def test_a_body_that_is_compressed_is_compared_as_it_is(serve, key):
    calls = Calls()
    serve(calls.view)
    assert send(key, b"\x1f\x8b1", Content_Encoding="gzip").status_code == 201
    assert send(key, b"\x1f\x8b1", Content_Encoding="gzip")[MARKER] == "true"
    assert send(key, b"\x1f\x8b2", Content_Encoding="gzip").status_code == 422


def test_parameters_without_names_count(serve, key):
    calls = Calls(lambda request, number: JsonResponse({}))
    serve(re_path(r"^(\d+)/$", calls.view))
    send(key, url="/7/")
    assert send(key, url="/8/").status_code == 422


def _form(fields: dict[str, Any], boundary: str) -> dict[str, Any]:
    return {"body": encode_multipart(boundary, fields), "content_type": f"multipart/form-data; boundary={boundary}"}


def test_of_a_form_its_fields_and_files_count_and_not_what_separates_them(serve, key):
    files = []

    def respond(request):
        files.append((request.POST["name"], request.FILES["file"].read()))
        return JsonResponse({"name": request.POST["name"]})

    serve(Calls(respond).view)
    file = lambda content: SimpleUploadedFile("a.txt", content, "text/plain")  # noqa: E731
    first = send(key, **_form({"name": "x", "file": file(b"abc")}, "one"))
    repeat = send(key, **_form({"name": "x", "file": file(b"abc")}, "two"))
    assert (repeat.content, repeat[MARKER]) == (first.content, "true")
    assert send(key, **_form({"name": "x", "file": file(b"abd")}, "one")).status_code == 422
    assert send(key, **_form({"name": "y", "file": file(b"abc")}, "one")).status_code == 422
    assert files == [("x", b"abc")]


def test_a_form_is_compared_though_the_token_in_it_was_looked_for(serve, key):
    def respond(request):
        return JsonResponse({"name": request.POST["name"]})

    calls = Calls(respond)
    serve(calls.view)
    client = Client(enforce_csrf_checks=True)
    token = "a" * 32
    client.cookies["csrftoken"] = token
    form = _form({"name": "x", "csrfmiddlewaretoken": token}, "one")
    assert send(key, client=client, **form).status_code == 200
    assert send(key, client=client, **form)[MARKER] == "true"
    assert send(key, client=client, **_form({"name": "x"}, "one")).status_code == 403


class ReadsTheStream:
    """A middleware that leaves nothing of the body for others."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        request.read()
        return self.get_response(request)

    def process_view(self, request: Any, *args: Any) -> None:
        request.read()


class ReadsTheStreamOfAView(ReadsTheStream):
    """The same, when the view is known."""

    def __call__(self, request: Any) -> Any:
        return self.get_response(request)


OURS = "pg_idempotency.django.middleware.IdempotencyMiddleware"


def test_a_body_that_is_gone_is_not_taken_for_an_empty_one(serve, key):
    serve(Calls().view, MIDDLEWARE=["test_django.ReadsTheStream", OURS])
    with pytest.raises(OutOfOrderError, match="the body was read before it could be compared"):
        send(key)
    assert send(key, client=quiet()).json()["code"] == "IDEMPOTENCY_OUT_OF_ORDER"


def test_the_middleware_keeps_the_body_for_whoever_reads_it_later(serve, key):
    calls = Calls(lambda request: HttpResponse(request.body))
    serve(calls.view, MIDDLEWARE=[OURS, "test_django.ReadsTheStreamOfAView"])
    assert send(key, {"a": 1}).content == b'{"a": 1}'


def test_the_limit_of_django_holds_for_a_body_that_is_compared(project, serve, key):
    calls = Calls()
    serve(calls.view)
    with override_settings(DATA_UPLOAD_MAX_MEMORY_SIZE=10):
        assert send(key, {"a": "0123456789"}).status_code >= 400
    assert (calls.count, records(project, key)) == (0, [])


#
# Whose a request is
#


def test_each_tenant_has_keys_of_its_own(project, serve, key):
    calls = Calls()
    serve(calls.view)
    assert send(key, X_Tenant="acme").json() == {"call": 1}
    assert send(key, X_Tenant="zeus").json() == {"call": 2}
    assert {record[0] for record in records(project, key)} == {"acme", "zeus"}


def test_each_user_has_keys_of_their_own(project, serve, key):
    view = idempotent_view(lambda request: JsonResponse({"user": request.user.username}))
    serve(view)
    for name in ("alice", "bob"):
        client = Client()
        client.force_login(User.objects.get_or_create(username=name)[0])
        assert send(key, client=client).json() == {"user": name}
        assert send(key, client=client).json() == {"user": name}
    assert len({record[1] for record in records(project, key)}) == 2


def test_strangers_do_not_share_a_scope(serve, key):
    calls = Calls(actor=lambda request: request.user.pk)
    serve(calls.view)
    with pytest.raises(TypeError, match="actor is None: who is not logged in must not get here"):
        send(key)
    assert calls.count == 0
    assert AnonymousUser().pk is None


@pytest.mark.parametrize("actor", ["", object(), True], ids=["empty", "object", "bool"])
def test_an_actor_that_is_the_same_for_everybody_is_refused(serve, key, actor):
    serve(Calls(actor=lambda request: actor).view)
    with pytest.raises(TypeError, match="actor is"):
        send(key)


def test_the_action_is_the_template_of_the_route_unless_it_has_a_name(project, serve, key):
    route, named = Calls(lambda request, id: JsonResponse({})), Calls(lambda request, id: JsonResponse({}), action="x")
    serve(path("orders/<int:id>/", route.view), path("named/<int:id>/", named.view))
    send(key, url="/orders/7/")
    send(key, url="/named/7/")
    assert [record[2] for record in records(project, key)] == ["POST /orders/<int:id>/", "x"]


#
# What is rolled back, and what is kept
#


@pytest.mark.parametrize("status", [400, 402, 404])
def test_an_answer_of_400_and_more_rolls_back_and_is_kept(project, serve, key, status, atomic_requests):
    calls = Calls(lambda request: JsonResponse({"call": calls.count}, status=status))
    serve(calls.view)
    first, repeat = send(key), send(key)
    assert (first.status_code, first.content) == (status, b'{"call": 1}')
    assert (repeat.status_code, repeat.content, repeat[MARKER]) == (status, first.content, "true")
    assert (calls.count, calls.rows(key)) == (1, 0)
    assert records(project, key)[0][3:] == ("errored", status)


@pytest.mark.parametrize("status", [409, 429, 500, 503])
def test_an_answer_that_a_repeat_may_change_is_not_kept(project, serve, key, status, atomic_requests):
    calls = Calls(lambda request: JsonResponse({"call": calls.count}, status=status))
    serve(calls.view)
    client = quiet()
    assert [send(key, client=client).json()["call"] for _ in range(2)] == [1, 2]
    assert (calls.rows(key), records(project, key)) == (0, [])


def test_a_refusal_is_kept_from_however_deep_it_comes(project, serve, key, atomic_requests):
    def respond(request):
        raise Refusal(402, {"error": "not enough money"}, {"Location": "/account"}, ttl="10 minutes")

    calls = Calls(respond)
    serve(calls.view)
    first, repeat = send(key), send(key)
    assert (first.status_code, first.json(), first["Location"]) == (402, {"error": "not enough money"}, "/account")
    assert MARKER not in first
    assert (repeat.status_code, repeat.content, repeat[MARKER]) == (402, first.content, "true")
    assert (calls.count, calls.rows(key)) == (1, 0)


def test_if_a_repeat_was_faster_with_its_answer_that_one_stays(project, serve, key):
    calls = Calls(lambda request: JsonResponse({"call": calls.count}, status=402))
    serve(calls.view)

    def be_faster(execute, sql, params, many, context):
        if "idempotency_store" in sql:
            project.query(
                "SELECT idempotency.idempotency_store("
                "'acme', 'POST /', %s::text, '{\"body\": {}}', 404, '{\"first\":1}')",
                key,
            )
        return execute(sql, params, many, context)

    with connection.execute_wrapper(be_faster):
        response = send(key)
    assert (response.status_code, response.content, response[MARKER]) == (404, b'{"first":1}', "true")
    assert calls.rows(key) == 0


@pytest.mark.parametrize("error, status", [(Http404(), 404), (RuntimeError("x"), 500)], ids=["404", "500"])
def test_what_a_view_raises_rolls_back_and_nothing_is_kept(project, serve, key, error, status, atomic_requests):
    def respond(request):
        raise error

    calls = Calls(respond)
    serve(calls.view)
    client = quiet()
    assert [send(key, client=client).status_code for _ in range(2)] == [status, status]
    assert (calls.count, calls.rows(key), records(project, key)) == (2, 0, [])


def test_an_error_that_was_swallowed_is_not_taken_for_success(project, serve, key):
    def respond(request):
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1/0")
        except Exception:
            pass
        return JsonResponse({})

    calls = Calls(respond)
    serve(calls.view)
    with pytest.raises(RolledBackError):
        send(key)
    assert (calls.rows(key), records(project, key)) == (0, [])
    assert connection.is_usable() and not connection.in_atomic_block


def test_a_view_that_has_all_rolled_back_has_no_answer(project, serve, key):
    def respond(request):
        transaction.set_rollback(True)
        return JsonResponse({})

    calls = Calls(respond)
    serve(calls.view)
    with pytest.raises(RolledBackError):
        send(key)
    assert (calls.rows(key), records(project, key)) == (0, [])


def test_a_view_that_returns_nothing_is_told(project, serve, key):
    calls = Calls(lambda request: None)
    serve(calls.view)
    with pytest.raises(ValueError, match="returned None instead of a response"):
        send(key)
    assert (calls.rows(key), records(project, key)) == (0, [])


#
# Transactions
#


def test_the_answer_is_committed_before_it_leaves_and_hooks_run_after_that(project, serve, key, atomic_requests):
    seen = []

    def respond(request):
        transaction.on_commit(lambda: seen.append((records(project, key)[0][3], Row.objects.filter(text=key).exists())))
        return JsonResponse({})

    serve(Calls(respond).view)
    send(key), send(key)
    assert seen == [("completed", True)]


def test_hooks_of_work_that_was_rolled_back_do_not_run(serve, key):
    seen = []

    def respond(request):
        transaction.on_commit(lambda: seen.append(1))
        return JsonResponse({}, status=422)

    serve(Calls(respond).view)
    assert send(key).status_code == 422
    assert seen == []


class Conflict(Exception):
    """What would have a view called again."""

    sqlstate = "40001"


@pytest.mark.parametrize("error", [RuntimeError("hook"), Conflict("hook")], ids=["error", "conflict"])
def test_an_error_of_a_hook_comes_out_and_the_answer_stays(serve, key, error):
    def respond(request):
        def hook():
            raise error

        transaction.on_commit(hook)
        return JsonResponse({"call": calls.count})

    calls = Calls(respond)
    serve(calls.view)
    with pytest.raises(type(error), match="hook"):
        send(key)
    assert send(key).json() == {"call": 1}
    assert calls.rows(key) == 1


def test_a_view_inside_of_another_transaction_is_refused(project, serve, key):
    calls = Calls()
    serve(calls.view)
    with pytest.raises(OutOfOrderError, match="a transaction is open"):
        with transaction.atomic():
            send(key)
    assert (calls.count, records(project, key)) == (0, [])
    assert send(key).status_code == 201


def test_a_view_of_a_database_without_autocommit_is_refused(serve, key):
    serve(Calls().view)
    connection.set_autocommit(False)
    try:
        with pytest.raises(OutOfOrderError, match="autocommit is off"):
            send(key)
    finally:
        connection.rollback()
        connection.set_autocommit(True)


def _raise_in_database(state: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"DO $$ BEGIN RAISE 'made' USING ERRCODE = '{state}'; END $$")


@pytest.mark.parametrize("state", ["40001", "40P01"])
def test_after_a_conflict_of_transactions_the_view_is_called_again(project, serve, key, state, atomic_requests):
    def respond(request):
        content = request.FILES["file"].read().decode()
        if calls.count < 3:
            _raise_in_database(state)
        return JsonResponse({"call": calls.count, "file": content})

    calls = Calls(respond)
    serve(calls.view)
    form = _form({"file": SimpleUploadedFile("a.txt", b"abc", "text/plain")}, "one")
    assert send(key, **form).json() == {"call": 3, "file": "abc"}
    assert (calls.rows(key), len(records(project, key))) == (1, 1)


def test_a_conflict_that_remains_is_answered_with_503(project, serve, key):
    calls = Calls(lambda request: _raise_in_database("40001"), retries=2)
    serve(calls.view)
    response = send(key, client=quiet())
    assert (response.status_code, response.json()["code"]) == (503, "TRANSACTION_CONFLICT")
    assert response["Retry-After"] == "1"
    assert (calls.count, calls.rows(key)) == (3, 0)


def test_a_conflict_at_commit_is_one_as_well(project, serve, key):
    project.query("CREATE TABLE at_commit (state text)")
    project.query(
        "CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'made' USING ERRCODE = NEW.state; END $$"
    )
    project.query(
        "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON at_commit DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION at_commit()"
    )

    def respond(request):
        if calls.count == 1:
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO at_commit VALUES ('40001')")
        return JsonResponse({"call": calls.count})

    calls = Calls(respond)
    serve(calls.view)
    assert send(key).json() == {"call": 2}
    assert calls.rows(key) == 1


#
# Lost connections
#


def _terminate(project: Any) -> None:
    """End Django's connection, and wait until it is gone."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()
    project.query("SELECT pg_terminate_backend(%s, 10000)", pid)


@pytest.fixture
def persistent():
    """A connection that is kept from one request to the next, as with CONN_MAX_AGE."""
    connection.settings_dict["CONN_MAX_AGE"] = None
    connection.close()
    yield
    connection.settings_dict["CONN_MAX_AGE"] = 0
    connection.close()


def test_a_persistent_connection_that_was_lost_meanwhile_is_replaced(project, serve, key, persistent):
    calls = Calls()
    serve(calls.view)
    _terminate(project)
    assert send(key).json() == {"call": 1}
    assert send(key)[MARKER] == "true"


def test_a_connection_that_is_lost_during_the_work_is_answered_with_503(project, serve, key, atomic_requests):
    def respond(request):
        if calls.count == 1:
            _terminate(project)
            Row.objects.count()
        return JsonResponse({"call": calls.count})

    calls = Calls(respond)
    serve(calls.view)
    response = send(key, client=quiet())
    assert (response.status_code, response.json()["code"]) == (503, "DATABASE_UNAVAILABLE")
    assert (calls.count, response["Retry-After"]) == (1, "1")
    # the connection can be used, and a repeat runs
    assert send(key).json() == {"call": 2}
    assert calls.rows(key) == 1


def test_a_database_that_goes_away_is_answered_with_503(project, serve, key, monkeypatch):
    def refuse(self, parameters):
        raise self.Database.OperationalError("no server")

    calls = Calls()
    serve(calls.view)
    connection.close()
    monkeypatch.setattr(type(connections["default"]), "get_new_connection", refuse)
    response = send(key, client=quiet())
    assert (response.status_code, response.json()["code"]) == (503, "DATABASE_UNAVAILABLE")
    assert response["Retry-After"] == "1"
    monkeypatch.undo()
    assert send(key).json() == {"call": 1}


@pytest.fixture
def proxy(project):
    """What stands between Django and its database, and cuts connections."""
    proxy = CutProxy(project.url)
    port = connection.settings_dict["PORT"]
    connection.settings_dict["PORT"] = str(urlsplit(proxy.url).port)
    connection.close()
    yield proxy
    connection.settings_dict["PORT"] = port
    connection.close()
    proxy.close()


def test_after_a_commit_that_was_not_answered_the_answer_is_asked_for(serve, key, proxy, atomic_requests):
    calls = Calls()
    serve(calls.view)
    proxy.cut_when(before_answer("COMMIT"))
    response = send(key)
    assert (response.status_code, response.json(), proxy.cuts) == (201, {"call": 1}, 1)
    assert (calls.count, calls.rows(key)) == (1, 1)
    assert connection.is_usable() and not connection.in_atomic_block


def test_after_a_commit_that_did_not_take_place_the_view_is_called_again(serve, key, proxy, atomic_requests):
    hooks = []

    def respond(request):
        transaction.on_commit(lambda call=calls.count: hooks.append(call))
        return JsonResponse({"call": calls.count})

    calls = Calls(respond)
    serve(calls.view)
    proxy.cut_when(before_statement("^COMMIT"))
    assert (send(key).json(), proxy.cuts) == ({"call": 2}, 1)
    assert (calls.rows(key), hooks) == (1, [2])


def test_a_commit_that_is_lost_twice_is_answered_with_503(serve, key, proxy):
    calls = Calls()
    serve(calls.view)
    proxy.cut_when(before_statement("^COMMIT"), times=2)
    response = send(key, client=quiet())
    assert (response.status_code, response.json()["code"], response["Retry-After"]) == (503, "OUTCOME_UNKNOWN", "1")
    assert (proxy.cuts, calls.rows(key)) == (2, 0)
    # the connection can be used, and a repeat runs
    assert send(key).json() == {"call": 3}


def test_a_commit_of_which_nothing_can_be_learned_is_answered_with_503(serve, key, proxy):
    calls = Calls()
    serve(calls.view)
    answered = before_answer("COMMIT")
    proxy.cut_when(lambda message: proxy.cuts > 0 or answered(message), times=100)
    response = send(key, client=quiet())
    assert (response.status_code, response.json()["code"], response["Retry-After"]) == (503, "OUTCOME_UNKNOWN", "1")
    assert calls.count == 1
    # a repeat tells
    proxy.pass_all()
    repeat = send(key)
    assert (repeat.json(), repeat[MARKER], calls.count, calls.rows(key)) == ({"call": 1}, "true", 1, 1)


def test_a_refusal_whose_transaction_is_lost_is_kept_over_another_connection(serve, key, proxy):
    calls = Calls(lambda request: JsonResponse({"call": calls.count}, status=402))
    serve(calls.view)
    proxy.cut_when(before_statement("^ROLLBACK"))
    assert (send(key).json(), proxy.cuts) == ({"call": 1}, 1)
    assert (send(key)[MARKER], calls.rows(key)) == ("true", 0)


#
# Many at once
#


def _over_http(server: tuple[str, int], key: str, method: str = "POST") -> tuple[int, dict[str, str], bytes]:
    client = http.client.HTTPConnection(*server, timeout=60)
    client.request(method, "/", b"{}", {"Idempotency-Key": key, "Content-Type": "application/json"})
    response = client.getresponse()
    result = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    client.close()
    return result


def test_a_repeat_of_a_request_that_is_still_at_work_is_answered_with_409(project, serve, server, key):
    started, go_on = threading.Event(), threading.Event()

    def respond(request):
        started.set()
        assert go_on.wait(60)
        return JsonResponse({"call": calls.count})

    calls = Calls(respond)
    serve(csrf_exempt(calls.view))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(_over_http, server, key)
        try:
            assert started.wait(60)
            status, headers, body = _over_http(server, key)
        finally:
            go_on.set()
        assert first.result()[0] == 200
    assert (status, json.loads(body)["code"]) == (409, "DUPLICATE_IN_PROGRESS")
    assert 1 <= int(headers["retry-after"]) <= 10
    assert _over_http(server, key)[1][MARKER.lower()] == "true"
    assert calls.count == 1


def test_a_repeat_may_wait_for_the_first_request(project, serve, server, key):
    started, go_on = threading.Event(), threading.Event()

    def respond(request):
        started.set()
        assert go_on.wait(60)
        return JsonResponse({"call": calls.count})

    calls = Calls(respond, wait="60 s")
    serve(csrf_exempt(calls.view))
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(_over_http, server, key)
        assert started.wait(60)
        second = pool.submit(_over_http, server, key)
        try:
            until(lambda: project.query(waiting)[0][0] > 0)
        finally:
            go_on.set()
        assert first.result()[2] == second.result()[2] == b'{"call": 1}'
    assert calls.count == 1


def test_of_ten_at_once_one_does_the_work(project, serve, server, key):
    barrier = threading.Barrier(10)

    def request(_):
        barrier.wait()
        return _over_http(server, key)

    calls = Calls()
    serve(csrf_exempt(calls.view))
    with ThreadPoolExecutor(10) as pool:
        responses = list(pool.map(request, range(10)))
    assert {status for status, _, _ in responses} <= {201, 409}
    done = [body for status, _, body in responses if status == 201]
    assert done and set(done) == {b'{"call": 1}'}
    assert (calls.count, calls.rows(key), len(records(project, key))) == (1, 1, 1)


#
# finished_by="service"
#


def service(**options: Any) -> Any:
    return Calls(finished_by="service", **options)


def test_what_the_service_has_said_is_the_answer_first_and_later(project, serve, key, atomic_requests):
    def respond(request):
        request.idempotency.finish(201, {"call": calls.count}, {"Location": "/orders/1/"})
        return HttpResponse("not this")

    calls = service(then=respond)
    serve(calls.view)
    first, repeat = send(key), send(key)
    for response in (first, repeat):
        assert (response.status_code, response.content, response["Location"]) == (201, b'{"call":1}', "/orders/1/")
    assert (MARKER in first, repeat[MARKER]) == (False, "true")
    assert (calls.count, calls.rows(key)) == (1, 1)


def test_a_header_of_several_values_is_one_with_commas(serve, key):
    links = ["</1>; rel=self", "</>; rel=up"]
    serve(service(then=lambda request: request.idempotency.finish(204, headers={"Link": links})).view)
    assert send(key)["Link"] == send(key)["Link"] == ", ".join(links)


def test_rows_that_are_written_after_finish_belong_to_the_work(serve, key):
    def respond(request):
        request.idempotency.finish(204)
        Row.objects.create(text=key)

    calls = service(then=respond)
    serve(calls.view)
    assert send(key).status_code == 204
    assert calls.rows(key) == 2


def test_a_view_that_does_not_hand_over_cannot_commit(project, serve, key, atomic_requests):
    calls = service(then=lambda request: HttpResponse("done"))
    serve(calls.view)
    with pytest.raises(UnfinishedError, match="Calls._work did not hand over request.idempotency") as raised:
        send(key)
    # it was the server that refused
    assert raised.value.sqlstate == "ID006"
    assert (calls.rows(key), records(project, key)) == (0, [])
    assert not connection.in_atomic_block
    calls._then = lambda request: request.idempotency.finish(204)
    assert send(key).status_code == 204


def test_a_view_that_does_not_hand_over_is_answered_with_500_and_told_of(serve, key, caplog):
    signals = []
    listen = lambda **kwargs: signals.append(kwargs["request"].path)  # noqa: E731
    got_request_exception.connect(listen)
    serve(service(then=lambda request: None).view)
    response = send(key, client=quiet())
    got_request_exception.disconnect(listen)
    assert (response.status_code, response.json()["code"]) == (500, "IDEMPOTENCY_UNFINISHED")
    assert key not in response.content.decode() and "hand over" not in response.content.decode()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.name == "django.request" and "did not hand over request.idempotency" in record.getMessage()
    assert signals == ["/"]


def test_a_view_that_does_not_hand_over_and_swallows_an_error_is_told_of_that(serve, key):
    def respond(request):
        try:
            _raise_in_database("22012")
        except Exception:
            pass

    serve(service(then=respond).view)
    with pytest.raises(RolledBackError):
        send(key)
    assert not connection.in_atomic_block and connection.is_usable()


def test_a_server_that_does_not_guard_commits_lets_it_pass(project, serve, key, caplog):
    def respond(request):
        with connection.cursor() as cursor:
            cursor.execute("SET LOCAL idempotency.commit_guard = off")
        return HttpResponse("done")

    calls = service(then=respond)
    serve(calls.view)
    assert send(key).content == b"done"
    assert (calls.rows(key), records(project, key)) == (1, [])
    assert "commit_guard is off" in caplog.text


def test_a_service_may_refuse(project, serve, key):
    def respond(request):
        request.idempotency.finish(402, {"error": "money"})
        return HttpResponse("not this", status=402)

    calls = service(then=respond)
    serve(calls.view)
    first, repeat = send(key), send(key)
    assert (first.status_code, first.content) == (402, b'{"error":"money"}')
    assert (repeat.status_code, repeat.content) == (402, first.content)
    assert (calls.count, calls.rows(key)) == (1, 0)


@pytest.mark.parametrize("response", [None, HttpResponse(b"not this", status=402)])
def test_a_service_may_keep_its_rows_with_a_refusal(project, serve, key, response):
    def respond(request):
        request.idempotency.finish(402, {"tries": 1}, keep_rows=True)
        return response

    calls = service(then=respond)
    serve(calls.view)
    first = send(key)
    assert (first.status_code, first.content) == (402, b'{"tries":1}')
    assert (calls.rows(key), records(project, key)[0][3]) == (1, "errored")


def test_a_view_may_refuse_before_it_has_called_a_service(project, serve, key):
    calls = service(then=lambda request: JsonResponse({"error": "amount"}, status=400))
    serve(calls.view)
    first, repeat = send(key), send(key)
    assert (first.status_code, repeat.content, repeat[MARKER]) == (400, first.content, "true")
    assert (calls.count, calls.rows(key)) == (1, 0)


def test_a_view_that_refuses_what_its_service_has_done_rolls_it_back(project, serve, key):
    def respond(request):
        request.idempotency.finish(201)
        return JsonResponse({"error": "after all"}, status=404)

    calls = service(then=respond)
    serve(calls.view)
    assert (send(key).status_code, send(key).status_code) == (404, 404)
    assert (calls.rows(key), records(project, key)[0][3:]) == (0, ("errored", 404))


def test_a_service_that_finishes_what_the_view_answers_is_refused(project, serve, key):
    calls = Calls(lambda request: request.idempotency.finish(201))
    serve(calls.view)
    with pytest.raises(OutOfOrderError, match='finished_by="service"'):
        send(key)
    assert (calls.rows(key), records(project, key)) == (0, [])


def test_a_service_that_finishes_twice_is_refused(project, serve, key):
    def respond(request):
        request.idempotency.finish(201)
        request.idempotency.finish(201)

    calls = service(then=respond)
    serve(calls.view)
    with pytest.raises(OutOfOrderError, match="finish was called twice"):
        send(key)
    assert calls.rows(key) == 0


#
# Classes
#


class Orders(IdempotentViewMixin, View):
    idempotency_options = {"tenant": tenant_of, "actor": None}
    calls = 0

    def get(self, request, id):
        return JsonResponse({"protected": request.idempotency is not None})

    def post(self, request, id):
        type(self).calls += 1
        Row.objects.create(text=request.idempotency.key)
        return JsonResponse({"id": id, "call": self.calls}, status=201)


def test_methods_of_a_class_are_protected(project, serve, key, atomic_requests):
    Orders.calls = 0
    serve(path("<int:id>/", Orders.as_view()))
    first, repeat = send(key, url="/7/"), send(key, url="/7/")
    assert (first.json(), repeat.content, repeat[MARKER]) == ({"id": 7, "call": 1}, first.content, "true")
    assert send(key, url="/8/").status_code == 422
    assert Client().get("/7/").json() == {"protected": False}
    assert send(key, url="/7/", method="put").status_code == 405
    assert send(None, url="/7/").status_code == 400
    assert Row.objects.filter(text=key).count() == 1


def test_a_class_may_be_protected_in_another_way_by_its_url(project, serve, key):
    serve(path("<int:id>/", Orders.as_view(idempotency_options={**Orders.idempotency_options, "action": "named"})))
    send(key, url="/7/")
    assert records(project, key)[0][2] == "named"


@pytest.mark.parametrize(
    "bases", [(LoginRequiredMixin, IdempotentViewMixin), (IdempotentViewMixin, LoginRequiredMixin)], ids=["first", "last"]
)
def test_who_is_not_logged_in_is_sent_away_before_anything_is_begun(project, serve, key, bases):
    class Private(*bases, View):
        def post(self, request):
            raise AssertionError("called")

    serve(Private.as_view())
    assert send(key).status_code == 302
    assert records(project, key) == []


def test_a_class_that_does_not_hand_over_is_named_with_its_method(serve, key):
    class Forgets(IdempotentViewMixin, View):
        idempotency_options = {"tenant": None, "finished_by": "service", "actor": None}

        def post(self, request):
            return HttpResponse()

    serve(Forgets.as_view())
    with pytest.raises(UnfinishedError, match=r"Forgets\.post did not hand over"):
        send(key)


#
# ASGI
#


def test_under_asgi_ordinary_views_are_protected(project, serve, key):
    async def request() -> Any:
        headers = {"Idempotency-Key": key}
        return await AsyncClient().post("/", b"{}", content_type="application/json", **headers)

    calls = Calls()
    serve(calls.view)
    first, repeat = asyncio.run(request()), asyncio.run(request())
    assert (first.status_code, first.content, repeat.content) == (201, b'{"call": 1}', first.content)
    assert (repeat[MARKER], calls.count, calls.rows(key)) == ("true", 1, 1)


#
# How it is set up
#


def test_asynchronous_views_are_refused_when_they_are_decorated():
    async def view(request):
        return HttpResponse()

    class Async(IdempotentViewMixin, View):
        async def post(self, request):
            return HttpResponse()

    with pytest.raises(TypeError, match="view is asynchronous"):
        idempotent_view(view)
    with pytest.raises(TypeError, match="Async.post is asynchronous"):
        Async.as_view()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tenants": None}, "there is no option tenants"),
        ({"actor": "shop.scope.nobody"}, "actor: "),
        ({"actor": 7}, "actor is a function"),
        ({"finished_by": "nobody"}, "finished_by is"),
        ({"mismatch_status": 200}, "mismatch_status is 422 or 409"),
        ({"replay_headers": ["Set-Cookie"]}, "must not be replayed"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_when_a_view_is_decorated(options, message):
    with pytest.raises(ImproperlyConfigured, match=message):
        idempotent_view(lambda request: HttpResponse(), **options)
    with pytest.raises(ImproperlyConfigured, match=message):
        Orders.as_view(idempotency_options=options)


@override_settings(IDEMPOTENCY={"header": "X-Key"})
def test_somebody_has_to_say_whose_requests_are():
    with pytest.raises(ImproperlyConfigured, match='says neither "tenant" nor "actor"'):
        idempotent_view(lambda request: HttpResponse())
    assert callable(idempotent_view(lambda request: HttpResponse(), tenant=None))


def error_shape(problem: Any) -> tuple[str, Any]:
    """Problems as some API has them."""
    return "application/json", {"error": {"code": problem.code}}


def test_problems_may_be_written_as_the_service_does(serve):
    serve(Calls(problem="test_django.error_shape").view)
    assert send().json() == {"error": {"code": "IDEMPOTENCY_KEY_MISSING"}}
    with pytest.raises(ImproperlyConfigured, match="problem: "):
        idempotent_view(lambda request: HttpResponse(), problem="test_django.nothing")


def test_a_setting_that_is_overridden_holds_for_views_that_exist(serve, key):
    calls = Calls()
    serve(calls.view)
    with override_settings(IDEMPOTENCY={"header": "X-Key", "actor": None}):
        assert send(X_Key=key).status_code == 201
    assert send(X_Key=key).status_code == 400


def test_another_database_may_be_used_with_the_extension_in_another_schema(project, serve, key):
    with created_database(schema="Odd 100% schema") as other, alias_of(other, "other"):
        used = []

        def respond(request):
            used.append((connections["other"].in_atomic_block, connection.in_atomic_block))
            return JsonResponse({"call": len(used)})

        serve(protect(respond, using="other", schema="Odd 100% schema"))
        assert [send(key).json() for _ in range(2)] == [{"call": 1}, {"call": 1}]
        assert used == [(True, False)]
        assert other.query('SELECT key FROM "Odd 100% schema".idempotency_key') == [(key,)]


def test_the_role_of_an_application_needs_no_right_on_the_table(project, serve, key):
    project.query("CREATE ROLE django_app LOGIN")
    project.query("GRANT USAGE ON SCHEMA idempotency TO django_app")
    project.query(
        "GRANT EXECUTE ON FUNCTION idempotency.idempotency_try_begin, idempotency.idempotency_finish, "
        "idempotency.idempotency_store TO django_app"
    )
    project.query("GRANT ALL ON probe_row, probe_row_id_seq TO django_app")
    connection.settings_dict["USER"] = "django_app"
    connection.close()
    try:
        calls = Calls(lambda request: JsonResponse({}, status=int(request.body)))
        serve(calls.view)
        for status in (200, 402):
            assert [send(f"{key}-{status}", status).status_code for _ in range(2)] == [status, status]
        assert calls.count == 2
    finally:
        connection.settings_dict["USER"] = "postgres"
        connection.close()
        project.query("DROP OWNED BY django_app")
        project.query("DROP ROLE django_app")


def test_an_error_of_the_package_that_any_view_raises_is_answered(serve):
    def view(request):
        raise InFlightError("key is in flight", retry_after=3)

    serve(csrf_exempt(view))
    response = send()
    assert (response.status_code, response["Retry-After"]) == (409, "3")
    assert response["Content-Type"] == "application/problem+json"


def test_what_the_decorator_leaves_is_a_view_as_before():
    @csrf_exempt
    def view(request):
        """What it does."""

    protected = protect(view)
    assert (protected.__name__, protected.__doc__, protected.csrf_exempt) == ("view", "What it does.", True)
    assert protected._non_atomic_requests == {"default"}
