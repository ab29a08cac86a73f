"""
Columns of the table of records, as Django can read them.

A record is known by four columns, and Django needs one. The table is the extension's and gets no more of
them, so its primary key is an expression: a JSON array of the four. It is the same for as long as the record
exists and belongs to nothing else, unlike a row's place in the table. What looks for one record asks for the
four columns instead, which the index has.
"""

from __future__ import annotations

import json
from typing import Any

from django.core.exceptions import EmptyResultSet
from django.db import models
from django.db.models.expressions import Col
from django.db.models.lookups import Exact

COLUMNS = ("tenant", "action", "key", "actor")


class _ScopeColumn(Col):
    """The four columns as one text."""

    def as_sql(self, compiler: Any, connection: Any) -> tuple[str, list[Any]]:
        columns = ", ".join(_names(self.alias, compiler))
        return f"pg_catalog.json_build_array({columns})::text", []


class ScopeField(models.TextField):
    """What a record is known by: tenant, action, key and actor, as JSON text."""

    def get_col(self, alias: str, output_field: Any = None) -> Col:
        return _ScopeColumn(alias, self, output_field)


@ScopeField.register_lookup
class ScopeExact(Exact):
    """One record, by the index of its four columns."""

    def as_sql(self, compiler: Any, connection: Any) -> tuple[str, list[Any]]:
        if not self.rhs_is_direct_value():
            return super().as_sql(compiler, connection)
        values = _scope_in(self.rhs)
        conditions = (f"{name} = %s" for name in _names(self.lhs.alias, compiler))
        return f"({' AND '.join(conditions)})", values


class TextColumn(models.TextField):
    """A column of another type, of which the text is read: an answer stays as it is, byte for byte."""

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:
        return f"{sql}::text", params


def _names(alias: str, compiler: Any) -> list[str]:
    table = compiler.quote_name_unless_alias(alias)
    return [f"{table}.{compiler.quote_name_unless_alias(column)}" for column in COLUMNS]


def _scope_in(text: Any) -> list[str]:
    """The four values in a primary key. Raises EmptyResultSet for what is none, such as from a mistyped URL."""
    try:
        values = json.loads(text)
    except (TypeError, ValueError) as error:
        raise EmptyResultSet from error
    if not isinstance(values, list) or [type(value) for value in values] != [str] * len(COLUMNS):
        raise EmptyResultSet
    return values
