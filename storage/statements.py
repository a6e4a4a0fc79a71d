"""One statement for many rows, by the driver's own means: SQLAlchemy's handling of each row costs more than the write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

import sqlalchemy as sa

_AT_ONCE = 2_000
_NAME = re.compile(r"(?<![:\w]):(\w+)")


def execute_many(connection: sa.Connection, sql: str, rows: Iterable[Mapping[str, Any] | tuple[Any, ...]]) -> None:
    """Run `sql`, written with `:name`s, once for each row: a mapping of the names, or their values in the statement's order.

    All rows are of one kind; they are taken some at a time, so that they need not be in memory together.
    """
    coming = iter(rows)
    while some := list(islice(coming, _AT_ONCE)):
        in_order = isinstance(some[0], tuple)
        connection.exec_driver_sql(_as_driver_wants(sql, connection.dialect.paramstyle, in_order), some)


def mark(connection: sa.Connection) -> str:
    """What stands for a value in the driver's own SQL."""
    return "?" if connection.dialect.paramstyle == "qmark" else "%s"


@lru_cache
def _as_driver_wants(sql: str, style: str, in_order: bool) -> str:
    if style == "qmark":  # SQLite's, which knows `:name` too
        return _NAME.sub("?", sql) if in_order else sql
    return _NAME.sub("%s" if in_order else r"%(\1)s", sql.replace("%", "%%"))
