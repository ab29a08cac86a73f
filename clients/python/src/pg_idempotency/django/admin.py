"""The records in Django's admin: to look at, and without the answers for who may not see them."""

from __future__ import annotations

from typing import Any

from django.contrib import admin

from .models import Record

#: What an answer and the state of its work consist of.
ANSWER = ("headers", "response", "body", "recovery_state")


@admin.register(Record)
class RecordAdmin(admin.ModelAdmin):
    """
    Read-only, for users with the permission ``pg_idempotency.view_record``.

    Answers are shown to those that have ``pg_idempotency.view_answer`` as well; for others they are not even read.
    """

    list_display = ("key", "action", "tenant", "actor", "state", "status_code", "created_at", "expires_at")
    list_filter = ("state",)
    search_fields = ("key__startswith", "action__startswith", "tenant__startswith")
    search_help_text = "The beginning of a key, an action or a tenant"
    # the index that there is, besides that of the key
    ordering = ("-expires_at",)
    # a count of all records would read the whole table
    show_full_result_count = False

    def has_add_permission(self, request: Any) -> bool:
        return False

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:
        return False

    def get_queryset(self, request: Any) -> Any:
        records = super().get_queryset(request)
        return records if _may_see_answers(request) else records.defer(*ANSWER)

    def get_fields(self, request: Any, obj: Any = None) -> list[str]:
        names = [field.name for field in Record._meta.fields if field.name not in ("id", "body")]
        if not _may_see_answers(request):
            return [name for name in names if name not in ANSWER]
        return [*names, "size_of_body"]

    get_readonly_fields = get_fields

    @admin.display(description="body")
    def size_of_body(self, record: Record) -> str:
        """An answer that is not JSON."""
        return "none" if record.body is None else f"{len(record.body)} bytes"


def _may_see_answers(request: Any) -> bool:
    return request.user.has_perm("pg_idempotency.view_answer")
