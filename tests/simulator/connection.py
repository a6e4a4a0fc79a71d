"""A connection to SQLite that does what the code under test asks of SQLAlchemy's, in a fraction of its time.

Statements are compiled by SQLAlchemy, values and rows pass through its types, and results are its own `Result`. What is left out is its
pool, its events and its contexts, which cost ten times what SQLite needs. A test lives through seeds with SQLAlchemy's
own connection too, and finds the same calls (tests/test_simulator.py).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData
from sqlalchemy.util import LRUCache

_DIALECT = sqlite.dialect(paramstyle="qmark")
_COMPILED: LRUCache[Any, Any] = LRUCache(1_000)
_TEXTS: dict[str, tuple[str, list[str]]] = {}
_METADATA: dict[tuple[str, ...], SimpleResultMetaData] = {}
_Process = Callable[[Any], Any] | None
_Point = Callable[[str, str], None]


def connect(file: Path) -> sqlite3.Connection:
    """SQLite for one connection alone, which loses nothing but with the file: what it would do for others and for durability takes long."""
    connection = sqlite3.connect(file, timeout=0, isolation_level=None, check_same_thread=False, cached_statements=500)
    for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=MEMORY", "synchronous=OFF"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


class _Result(IteratorResult[Any]):
    rowcount = -1


class Connection:
    """What is used of `sa.Connection`; `point` is passed before each statement."""

    dialect = _DIALECT

    def __init__(self, raw: sqlite3.Connection, point: _Point) -> None:
        self.raw, self._point = raw, point

    @contextmanager
    def begin(self) -> Iterator[None]:
        """A transaction that commits, or leaves no trace whatever ends it."""
        self._run("BEGIN IMMEDIATE", ())
        try:
            yield
            self.raw.execute("COMMIT")
        except BaseException:
            self.raw.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close it."""
        self.raw.close()

    def execute(self, statement: Any, parameters: Any = None) -> _Result:
        """Run a statement, once or, with a list of several, many times."""
        many: Sequence[Mapping[str, Any]] = [parameters] if isinstance(parameters, Mapping) else parameters or [{}]
        if isinstance(statement, sa.TextClause):
            sql, names = _text(statement)
            return self._run(sql, [[row[name] for name in names] for row in many])
        compiled, extracted, *_ = statement._compile_w_cache(
            _DIALECT, compiled_cache=_COMPILED, column_keys=sorted(many[0]), for_executemany=len(many) > 1,
            schema_translate_map=None,
        )  # fmt: skip
        if compiled.post_compile_params:  # a list of values, say: rare
            compiled, extracted = statement.compile(
                dialect=_DIALECT, column_keys=sorted(many[0]), compile_kwargs={"render_postcompile": True}
            ), None  # fmt: skip
        rows = [_values(compiled, compiled.construct_params(row, extracted_parameters=extracted)) for row in many]
        return self._run(compiled.string, rows, _processors(compiled))

    def scalar(self, statement: Any, parameters: Any = None) -> Any:
        """The first value of the first row."""
        return self.execute(statement, parameters).scalar()

    def scalars(self, statement: Any, parameters: Any = None) -> sa.ScalarResult[Any]:
        """The first value of each row."""
        return self.execute(statement, parameters).scalars()

    def exec_driver_sql(self, sql: str, parameters: Any = ()) -> _Result:
        """Run a statement of SQLite's own."""
        return self._run(sql, parameters if isinstance(parameters, list) else [parameters])

    def _run(self, sql: str, rows: Sequence[Sequence[Any]], processors: Sequence[_Process] = ()) -> _Result:
        self._point("execute", sql.split(" ", 1)[0])
        try:
            cursor = self.raw.executemany(sql, rows) if len(rows) > 1 else self.raw.execute(sql, *rows)
            found = cursor.fetchall()
        except sqlite3.Error as error:
            raise sa.exc.DBAPIError.instance(sql, None, error, sqlite3.Error) from error
        if any(processors):
            found = [
                tuple(process(value) if process else value for process, value in zip(processors, row, strict=True))
                for row in found
            ]
        result = _Result(_metadata(cursor), iter(found))
        result.rowcount = cursor.rowcount
        return result


def _text(statement: sa.TextClause) -> tuple[str, list[str]]:
    """The SQL of a text with `:names`, and these in their order."""
    known = _TEXTS.get(statement.text)
    if known is None:
        compiled: Any = statement.compile(dialect=_DIALECT)
        known = _TEXTS[statement.text] = compiled.string, list(compiled.positiontup or ())
    return known


def _values(compiled: Any, parameters: Mapping[str, Any]) -> list[Any]:
    """What is bound, in its order, as SQLite takes it."""
    bind = compiled._bind_processors
    return [bind[name](parameters[name]) if name in bind else parameters[name] for name in compiled.positiontup or ()]


def _processors(compiled: Any) -> Sequence[_Process]:
    """What makes Python's values of a row's."""
    known: Sequence[_Process] | None = compiled.__dict__.get("afterlog_processors")
    if known is None:
        known = [column.type._cached_result_processor(_DIALECT, None) for column in compiled._result_columns]
        compiled.afterlog_processors = known
    return known


def _metadata(cursor: sqlite3.Cursor) -> SimpleResultMetaData:
    names = tuple(column[0] for column in cursor.description or ())
    known = _METADATA.get(names)
    if known is None:
        known = _METADATA[names] = SimpleResultMetaData(names)
    return known
