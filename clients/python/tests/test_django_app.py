"""The app around the views: records and their admin, the migration, the command, checks, and work without a request."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

# first, since it sets Django up
from django_project.fixtures import alias_of, key, project

import pytest  # isort: skip
from django.contrib.auth.models import Permission, User
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.core.management.base import SystemCheckError
from django.db import IntegrityError, connection, connections, transaction
from django.db.migrations.executor import MigrationExecutor
from django.test import Client, override_settings
from django.urls import reverse
from pg_idempotency import OutOfOrderError, Refusal, Scope, UnavailableError, UnfinishedError
from pg_idempotency.django import idempotent
from pg_idempotency.django.checks import check_idempotency
from pg_idempotency.django.middleware import IdempotencyMiddleware
from pg_idempotency.django.models import Record
from pg_idempotency.django.operations import CreateIdempotency
from probe.models import Row
from support import created_database

# fixtures that are used by their names
__all__ = ["key", "project"]

pytestmark = pytest.mark.usefixtures("project")

PYTHON = Path(__file__).parents[1]


def scope_of(key: str, **changes: str) -> Scope:
    return Scope(**{"tenant": "acme", "action": "orders.create", "key": key, **changes})


def store(project: Any, scope: Scope, response: str | None = '{"a":  1}', status: int = 201) -> None:
    project.query(
        "SELECT idempotency.idempotency_store(%s::text, %s::text, %s::text, '{}', %s, %s::json, '{\"etag\": \"x\"}', "
        "actor => %s::text)",
        scope.tenant, scope.action, scope.key, status, response, scope.actor,
    )  # fmt: skip


#
# Records
#


def test_a_record_has_what_the_table_has(project, key):
    scope = scope_of(key, actor="alice")
    store(project, scope)
    record = Record.objects.get(key=key)
    assert record.scope == scope
    assert (record.state, record.status_code, record.attempt) == ("completed", 201, 1)
    # byte for byte
    assert (record.response, record.headers) == ('{"a":  1}', '{"etag": "x"}')
    assert record.expires_at > record.finished_at >= record.created_at
    assert str(record) == f"orders.create {key}"


@pytest.mark.parametrize("odd", ['"', "/", "[a]", "\\", "\u00e9", "%s", "'"])
def test_a_record_is_found_by_its_primary_key(project, key, odd):
    scopes = [scope_of(key, tenant=odd), scope_of(key, action=odd), scope_of(key, actor=odd), scope_of(key)]
    for scope in scopes:
        store(project, scope)
    records = list(Record.objects.filter(key=key))
    assert len({record.pk for record in records}) == 4
    for record in records:
        assert Record.objects.get(pk=record.pk).scope == record.scope
        assert list(Record.objects.filter(pk__in=[record.pk])) == [record]
    ordered = sorted(records, key=lambda record: record.pk, reverse=True)
    assert list(Record.objects.filter(key=key).order_by("-pk")) == ordered
    assert Record.objects.filter(pk__in=Record.objects.filter(key=key)).count() == 4


def test_a_record_is_found_by_the_index(project, key):
    store(project, scope_of(key))
    pk = Record.objects.get(key=key).pk
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")
        plan = Record.objects.filter(pk=pk).explain()
    assert "Index Scan using idempotency_key_pkey" in plan and "actor" in plan.split("Index Cond")[1]


@pytest.mark.parametrize("pk", ["", "x", "[]", "7", '["a", "b", "c", 1]', '["a", "b", "c"]', '{"a": 1}'])
def test_what_is_no_primary_key_finds_nothing(pk):
    assert not Record.objects.filter(pk=pk).exists()


def test_records_cannot_be_written(project, key):
    store(project, scope_of(key))
    record = Record.objects.get(key=key)
    records = Record.objects.filter(key=key)
    for write in (
        record.save,
        record.delete,
        records.delete,
        lambda: records.update(status_code=500),
        lambda: records.bulk_update([record], ["status_code"]),
        lambda: Record.objects.create(key="x"),
        lambda: Record.objects.bulk_create([record]),
        lambda: Record.objects.get_or_create(key="x"),
        lambda: Record.objects.update_or_create(key=key, defaults={"status_code": 500}),
    ):
        with pytest.raises(TypeError, match="written by the functions of the extension"):
            write()
    assert Record.objects.get(key=key).status_code == 201


def test_records_are_those_of_the_database_that_the_setting_names(project, key):
    store(project, scope_of(key))
    with created_database() as other, alias_of(other, "other"):
        with override_settings(IDEMPOTENCY={"actor": None, "using": "other"}):
            assert not Record.objects.filter(key=key).exists()
            assert Record.objects.using("default").filter(key=key).exists()


def test_the_model_is_what_its_migration_says():
    out = StringIO()
    call_command("makemigrations", "--check", "--dry-run", stdout=out)
    assert "No changes detected" in out.getvalue()


def test_permissions_are_made_and_no_table():
    names = Permission.objects.filter(content_type__app_label="pg_idempotency").values_list("codename", flat=True)
    assert set(names) == {"view_record", "view_answer"}
    assert "pg_idempotency_record" not in connection.introspection.table_names()
    assert not Record._meta.managed


#
# Admin
#


def staff(*permissions: str) -> Client:
    name = "-".join(("staff", *permissions))
    user, _ = User.objects.get_or_create(username=name, is_staff=True)
    content_type = ContentType.objects.get_for_model(Record)
    user.user_permissions.set(Permission.objects.filter(content_type=content_type, codename__in=permissions))
    client = Client()
    client.force_login(user)
    return client


def test_the_admin_lists_searches_and_filters(project, key):
    store(project, scope_of(key))
    store(project, scope_of(f"other-{key}"), status=404)
    client, url = staff("view_record"), reverse("admin:pg_idempotency_record_changelist")
    listed = client.get(url, {"q": key[:20]}).content.decode()
    assert key in listed and f"other-{key}" not in listed
    listed = client.get(url, {"state__exact": "errored"}).content.decode()
    assert f"other-{key}" in listed and f">{key}<" not in listed
    assert "delete_selected" not in listed
    assert f"other-{key}" in client.get(url, {"q": "orders."}).content.decode()
    assert f"other-{key}" not in client.get(url, {"q": "zeus"}).content.decode()


def test_the_admin_shows_answers_to_who_may_see_them(project, key):
    store(project, scope_of(key), '{"secret": "s3cret"}')
    url = reverse("admin:pg_idempotency_record_change", args=[Record.objects.get(key=key).pk])
    page = staff("view_record").get(url)
    assert (page.status_code, key in page.content.decode(), "s3cret" in page.content.decode()) == (200, True, False)
    assert "s3cret" in staff("view_record", "view_answer").get(url).content.decode()
    assert staff("view_answer").get(url).status_code == 403


def test_the_admin_does_not_read_answers_for_who_may_not_see_them(project, key):
    store(project, scope_of(key))
    url = reverse("admin:pg_idempotency_record_change", args=[Record.objects.get(key=key).pk])
    client = staff("view_record")
    statements: list[str] = []

    def log(execute, sql, params, many, context):
        statements.append(sql)
        return execute(sql, params, many, context)

    with connection.execute_wrapper(log):
        client.get(url)
    (read,) = [statement for statement in statements if '"idempotency_key"."state"' in statement]
    assert '"response"' not in read and '"body"' not in read and '"headers"' not in read


def test_the_admin_tells_the_size_of_an_answer_that_is_not_json(project, key):
    project.query(
        "SELECT idempotency.idempotency_store('acme', 'x', %s::text, '{}', 200, body => '\\x000102'::bytea)", key
    )
    url = reverse("admin:pg_idempotency_record_change", args=[Record.objects.get(key=key).pk])
    assert "3 bytes" in staff("view_record", "view_answer").get(url).content.decode()


def test_the_admin_writes_nothing(project, key):
    store(project, scope_of(key))
    pk = Record.objects.get(key=key).pk
    client = Client()
    client.force_login(User.objects.get_or_create(username="root", is_staff=True, is_superuser=True)[0])
    for name, arguments in (("add", []), ("delete", [pk])):
        assert client.get(reverse(f"admin:pg_idempotency_record_{name}", args=arguments)).status_code == 403
    changed = client.post(reverse("admin:pg_idempotency_record_change", args=[pk]), {"status_code": 500})
    assert changed.status_code == 403
    assert Record.objects.get(pk=pk).status_code == 201


def test_the_admin_knows_no_record_that_is_not_there():
    response = staff("view_record").get(reverse("admin:pg_idempotency_record_change", args=["nothing"]))
    # it says so, and goes to where it began
    assert (response.status_code, response["Location"]) == (302, "/admin/")


#
# The migration
#


def forwards(operation: CreateIdempotency, alias: str) -> None:
    with connections[alias].schema_editor() as editor:
        operation.database_forwards("shop", editor, None, None)


def backwards(operation: CreateIdempotency, alias: str) -> None:
    with connections[alias].schema_editor() as editor:
        operation.database_backwards("shop", editor, None, None)


WHERE = "SELECT extnamespace::regnamespace::text FROM pg_extension WHERE extname = 'idempotency'"


def test_the_operation_creates_the_extension_and_its_schema():
    with created_database() as other, alias_of(other, "other"):
        other.query("DROP EXTENSION idempotency")
        other.query("DROP SCHEMA idempotency")
        operation = CreateIdempotency(schema="Once more")
        for _ in range(2):
            forwards(operation, "other")
        assert other.query(WHERE) == [('"Once more"',)]
        # what protects requests stays
        backwards(operation, "other")
        assert other.query(WHERE) == [('"Once more"',)]
        with pytest.raises(ImproperlyConfigured, match="in schema Once more, not in idempotency"):
            forwards(CreateIdempotency(), "other")


def test_the_operation_needs_no_rights_where_the_extension_is(project):
    project.query("CREATE ROLE django_migrates LOGIN")
    try:
        with alias_of(project, "other"):
            connections["other"].settings_dict["USER"] = "django_migrates"
            forwards(CreateIdempotency(), "other")
            with connections["other"].cursor() as cursor:
                cursor.execute("SELECT current_user")
                assert cursor.fetchone() == ("django_migrates",)
    finally:
        project.query("DROP ROLE django_migrates")


def test_the_operation_asks_the_router_and_leaves_other_databases_alone(project, monkeypatch):
    class Nowhere:
        def allow_migrate(self, db, app_label, **hints):
            return False

    with created_database() as other, alias_of(other, "other"):
        other.query("DROP EXTENSION idempotency")
        with override_settings(DATABASE_ROUTERS=[Nowhere()]):
            forwards(CreateIdempotency(), "other")
        assert other.query(WHERE) == []
        connections["other"].vendor = "sqlite"
        forwards(CreateIdempotency(), "other")
        assert other.query(WHERE) == []


def test_the_operation_is_written_into_migrations_and_goes_back():
    operation = CreateIdempotency(schema="x")
    assert operation.deconstruct() == ("CreateIdempotency", (), {"schema": "x"})
    assert "schema x" in operation.describe()
    assert operation.reversible
    with created_database() as other, alias_of(other, "other"):
        call_command("migrate", database="other", verbosity=0)
        call_command("migrate", "shop", "zero", database="other", verbosity=0)
        assert ("shop", "0001_idempotency") not in MigrationExecutor(connections["other"]).loader.applied_migrations
        assert other.query(WHERE) == [("idempotency",)]


#
# The command
#


def run(*arguments: str, **options: Any) -> str:
    out = StringIO()
    call_command("idempotency", *arguments, stdout=out, no_color=True, **options)
    return out.getvalue()


def test_health_tells_how_it_is(project):
    said = run("health")
    assert "version: 1.0" in said and "preloaded: True" in said and "warnings" not in said
    assert said.endswith("All is well.\n")


def test_health_fails_when_something_is_wrong(project, key):
    project.query("ALTER TABLE idempotency.idempotency_key REPLICA IDENTITY NOTHING")
    project.query("CREATE PUBLICATION published FOR TABLE idempotency.idempotency_key")
    try:
        with pytest.raises(CommandError, match="published without a replica identity"):
            run("health")
        command = [sys.executable, "manage.py", "idempotency", "health"]
        ended = subprocess.run(command, **in_project(project), timeout=120)
        assert (ended.returncode, "without a replica identity" in ended.stderr) == (1, True)
    finally:
        project.query("DROP PUBLICATION published")
        project.query("ALTER TABLE idempotency.idempotency_key REPLICA IDENTITY DEFAULT")


def test_health_fails_where_the_extension_is_missing():
    with created_database() as other, alias_of(other, "other"):
        other.query("DROP EXTENSION idempotency")
        with pytest.raises(CommandError, match="idempotency_health"):
            run("health", database="other")


def expired(project: Any, key: str) -> None:
    """A record that has expired."""
    store(project, scope_of(key))
    project.query("UPDATE idempotency.idempotency_key SET expires_at = now() - interval '1 s' WHERE key = %s", key)


@pytest.mark.parametrize("arguments", [[], ["--batch-size", "1", "--max-duration", "1 min"]])
def test_sweep_deletes_what_has_expired(project, key, arguments):
    store(project, scope_of(f"{key}-stays"))
    expired(project, key)
    assert "swept" in run("sweep", *arguments)
    assert set(Record.objects.filter(key__startswith=key).values_list("key", flat=True)) == {f"{key}-stays"}


def test_sweep_says_what_it_cannot_do(project):
    with pytest.raises(CommandError, match="batch_size|batch size"):
        run("sweep", "--batch-size", "0")
    with pytest.raises(CommandError, match="no transaction may be open"):
        with transaction.atomic():
            run("sweep")


#
# Checks
#


def ids(**settings: Any) -> list[str]:
    with override_settings(**settings):
        return [message.id.split(".")[1] for message in check_idempotency(None)]


def test_checks_find_what_is_wrong():
    assert ids() == []
    assert ids(IDEMPOTENCY={}) == ["W001"]
    assert ids(IDEMPOTENCY={"actor": None}) == []
    assert ids(IDEMPOTENCY={"tenant": "nowhere.at_all"}) == ["E001"]
    assert ids(IDEMPOTENCY={"tenants": None}) == ["W001", "E001"]
    assert ids(IDEMPOTENCY={"tenant": None, "using": "nowhere"}) == ["E002"]
    assert ids(MIDDLEWARE=[]) == ["E005"]
    assert ids(MIDDLEWARE=["test_django_app.Own"]) == []


def test_checks_look_at_the_database(monkeypatch):
    monkeypatch.setattr(connection, "vendor", "sqlite")
    assert ids() == ["E003"]
    monkeypatch.undo()
    monkeypatch.setitem(connection.settings_dict, "AUTOCOMMIT", False)
    assert ids() == ["E004"]


class Own(IdempotencyMiddleware):
    """A middleware of the service's own."""


def test_checks_are_a_part_of_manage_check():
    with override_settings(MIDDLEWARE=[]):
        with pytest.raises(SystemCheckError, match="pg_idempotency.E005"):
            call_command("check")


def test_a_setting_that_cannot_be_meant_stops_the_service():
    with override_settings(IDEMPOTENCY={"mismatch_status": 200}):
        with pytest.raises(ImproperlyConfigured, match="mismatch_status"):
            Client().get("/")


#
# Work outside of views
#


def test_work_is_done_once_and_committed_with_its_answer(project, key):
    hooks = []
    for _ in range(2):
        with idempotent(scope_of(key), '{"a": 1}') as claim:
            if not claim.replayed:
                Row.objects.create(text=key)
                transaction.on_commit(lambda: hooks.append(Record.objects.get(key=key).state))
                claim.finish(201, {"id": 7})
    assert (claim.answer.replayed, claim.answer.text) == (True, '{"id":7}')
    assert (Row.objects.filter(text=key).count(), hooks) == (1, ["completed"])


def test_work_that_fails_leaves_nothing(key):
    with pytest.raises(RuntimeError):
        with idempotent(scope_of(key)):
            Row.objects.create(text=key)
            raise RuntimeError
    with pytest.raises(UnfinishedError):
        with idempotent(scope_of(key)):
            Row.objects.create(text=key)
    with idempotent(scope_of(key)) as claim:
        Row.objects.create(text=key)
        raise Refusal(402)
    assert (claim.answer.status, Row.objects.filter(text=key).count()) == (402, 0)
    assert Record.objects.get(key=key).state == "errored"


def test_work_inside_of_another_transaction_is_refused(key):
    with pytest.raises(OutOfOrderError, match="a transaction is open"):
        with transaction.atomic(), idempotent(scope_of(key)):
            pass


def test_work_may_belong_to_a_transaction_of_the_caller(key):
    with transaction.atomic():
        Row.objects.create(text=key)
        with idempotent(scope_of(key), commit=False) as claim:
            Row.objects.create(text=key)
            claim.finish(204)
        assert connection.in_atomic_block
    assert (Row.objects.filter(text=key).count(), Record.objects.get(key=key).state) == (2, "completed")


def test_work_that_refuses_leaves_the_transaction_of_the_caller(key):
    with transaction.atomic():
        Row.objects.create(text=key)
        with idempotent(scope_of(key), commit=False):
            Row.objects.create(text=key)
            try:
                Row(pk=0).save(force_insert=True), Row(pk=0).save(force_insert=True)
            except IntegrityError:
                raise Refusal(402)
    assert (Row.objects.filter(text=key).count(), Record.objects.get(key=key).state) == (1, "errored")


@pytest.mark.parametrize("answered", [False, True])
def test_work_without_the_transaction_that_it_belongs_to_is_refused(project, key, answered):
    if answered:
        store(project, scope_of(key))
    with pytest.raises(OutOfOrderError, match="with commit=False"):
        with idempotent(scope_of(key), commit=False):
            raise AssertionError("the work was begun")
    assert Record.objects.filter(key=key).count() == answered


def test_an_error_of_a_hook_comes_out_of_work(key):
    def hook():
        raise RuntimeError("hook")

    with pytest.raises(RuntimeError, match="hook"):
        with idempotent(scope_of(key)) as claim:
            transaction.on_commit(hook)
            claim.finish(204)
    assert Record.objects.get(key=key).status_code == 204


def test_work_may_be_of_another_database(key):
    with created_database(schema="elsewhere") as other, alias_of(other, "other"):
        with idempotent(scope_of(key), using="other", schema="elsewhere", ttl="1 hour") as claim:
            claim.finish(204)
        kept = other.query("SELECT key, expires_at < now() + interval '61 min' FROM elsewhere.idempotency_key")
        assert kept == [(key, True)]


def test_the_connection_can_be_used_after_work_has_lost_it(project, key):
    with pytest.raises(UnavailableError, match="the connection was lost"):
        with idempotent(scope_of(key)):
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                (pid,) = cursor.fetchone()
            project.query("SELECT pg_terminate_backend(%s, 10000)", pid)
            Row.objects.count()
    assert Row.objects.filter(text=key).count() == 0


#
# The project
#


def in_project(project: Any, **environment: str) -> dict[str, Any]:
    """How a command of the project is run."""
    return {
        "cwd": PYTHON / "tests" / "django_project",
        "env": {**os.environ, "DATABASE_URL": project.url, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        "capture_output": True,
        "text": True,
    }


@pytest.mark.parametrize("atomic_requests", ["off", "on"])
def test_the_tests_of_the_project_pass(project, atomic_requests):
    command = [sys.executable, "manage.py", "test", "--noinput", "shop"]
    ended = subprocess.run(command, **in_project(project, ATOMIC_REQUESTS=atomic_requests), timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "Ran 11 tests" in ended.stderr and "\nOK\n" in ended.stderr


def blocks_of(document: Path) -> list[str]:
    """The blocks of Python in a document."""
    return [block.split("```", 1)[0] for block in document.read_text().split("```python\n")[1:]]


def test_what_the_document_shows_is_in_the_project():
    shown = blocks_of(PYTHON / "django.md")
    files = [path.read_text() for path in (PYTHON / "tests" / "django_project").rglob("*.py")]
    assert len(shown) >= 8
    for block in shown:
        for part in block.split("\n# ...\n"):
            assert any(part.strip("\n") in text for text in files), part
