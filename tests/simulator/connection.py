"""A connection to SQLite that does what the code under test asks of SQLAlchemy's, in a fraction of its time.

Statements are compiled by SQLAlchemy, values and rows pass through its types, and results are its own `Result`. What is left out is its
pool, its events and its contexts, which cost ten times what SQLite needs. A test lives through seeds with SQLAlchemy's
own connection too, and finds the same calls (tests/test_simulator.py).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData
from sqlalchemy.util import LRUCache

from tests.simulator.memory import give_back

_DIALECT = sqlite.dialect(paramstyle="qmark")
_COMPILED: LRUCache[Any, Any] = LRUCache(1_000)
_TEXTS: dict[str, tuple[str, list[str]]] = {}
_VERBS: dict[str, str] = {}
_METADATA: dict[str, SimpleResultMetaData] = {}
_Processors = Sequence[tuple[int, Callable[[Any], Any]]]
_Point = Callable[[str, str], None]
_Ran = tuple[str, sqlite3.Cursor, list[Any]]


class _Result(IteratorResult[Any]):
    rowcount = -1


class _Done(NamedTuple):
    rowcount: int


class _Plan:
    """One statement, compiled for parameters of certain names; it holds the statement, whose `id` is then nobody else's."""

    def __init__(self, statement: Any, names: tuple[str, ...], *, many: bool) -> None:
        self.statement = statement
        self.compiled, self._literals, *_ = statement._compile_w_cache(
            _DIALECT, compiled_cache=_COMPILED, column_keys=sorted(names), for_executemany=many, schema_translate_map=None,
        )  # fmt: skip
        self._bind = self.compiled._bind_processors
        self._order: Sequence[str] = self.compiled.positiontup or ()
        self._given = all(self.compiled.binds[name].key == name and name in names for name in self._order)
        processors = (column.type._cached_result_processor(_DIALECT, None) for column in self.compiled._result_columns)
        self.processors = [(at, process) for at, process in enumerate(processors) if process]
        """What makes Python's values of a row's."""

    def values(self, row: Mapping[str, Any]) -> list[Any]:
        """What is bound, in its order, as SQLite takes it."""
        bind = self._bind
        found = row if self._given else self._with_literals(row)
        return [bind[name](found[name]) if name in bind else found[name] for name in self._order]

    def expanded(self, row: Mapping[str, Any]) -> tuple[str, list[Any]]:
        """The SQL and what is bound, where a parameter is a list of values."""
        state = self.compiled._process_parameters_for_postcompile(self._with_literals(row))
        bind, found = {**self._bind, **state.processors}, state.parameters
        order = state.positiontup or ()
        return state.statement, [bind[name](found[name]) if name in bind else found[name] for name in order]

    def _with_literals(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self.compiled.construct_params(row, extracted_parameters=self._literals)
        return found


_PLANS: dict[tuple[int, tuple[str, ...], bool], _Plan] = {}


class _Transaction:
    """A generator would be felt here too."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.exec_driver_sql("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: object) -> None:
        raw = self._connection.raw
        try:
            if kind is None:
                raw.execute("COMMIT")
        finally:
            if raw.in_transaction:
                raw.execute("ROLLBACK")


class Connection:
    """What is used of `sa.Connection`; `point` is passed before each statement."""

    dialect = _DIALECT

    def __init__(self, raw: sqlite3.Connection, point: _Point) -> None:
        self.raw, self._point = raw, point

    def begin(self) -> _Transaction:
        """A transaction that commits, or leaves no trace whatever ends it."""
        return _Transaction(self)

    def close(self) -> None:
        """Let go of it; the next world may have the connection to SQLite."""
        raw = self.raw
        del self.raw  # whoever is late has nothing to do with the next world
        give_back(raw)

    def execute(self, statement: Any, parameters: Any = None) -> Any:
        """Run a statement, once or, with a list of several, many times."""
        return _result(*self._prepared(statement, parameters))

    def scalar(self, statement: Any, parameters: Any = None) -> Any:
        """The first value of the first row."""
        _, _, found = self._prepared(statement, parameters)
        return found[0][0] if found else None

    def scalars(self, statement: Any, parameters: Any = None) -> sa.ScalarResult[Any]:
        """The first value of each row."""
        found: sa.ScalarResult[Any] = self.execute(statement, parameters).scalars()
        return found

    def exec_driver_sql(self, sql: str, parameters: Any = ()) -> Any:
        """Run a statement of SQLite's own."""
        return _result(*self._run(sql, parameters if isinstance(parameters, list) else [parameters]))

    def _prepared(self, statement: Any, parameters: Any) -> _Ran:
        many: Sequence[Mapping[str, Any]] = [parameters] if isinstance(parameters, Mapping) else parameters or [{}]
        if isinstance(statement, sa.TextClause):
            sql, names = _text(statement)
            return self._run(sql, [[row[name] for name in names] for row in many])
        plan = _plan(statement, tuple(many[0]), many=len(many) > 1)
        if plan.compiled.post_compile_params:  # a list of values, say: rare
            sql, values = plan.expanded(many[0])
            return self._run(sql, [values], plan.processors)
        return self._run(plan.compiled.string, [plan.values(row) for row in many], plan.processors)

    def _run(self, sql: str, rows: Sequence[Sequence[Any]], processors: _Processors = ()) -> _Ran:
        verb = _VERBS.get(sql)
        if verb is None:
            verb = _VERBS[sql] = sql.split(" ", 1)[0]
        self._point("execute", verb)
        try:
            cursor = self.raw.executemany(sql, rows) if len(rows) > 1 else self.raw.execute(sql, *rows)
            found = cursor.fetchall()
        except sqlite3.Error as error:
            raise sa.exc.DBAPIError.instance(sql, None, error, sqlite3.Error) from error
        if processors and found:
            found = [_processed(row, processors) for row in found]
        return sql, cursor, found


def _result(sql: str, cursor: sqlite3.Cursor, found: list[Any]) -> Any:
    """What SQLAlchemy makes of rows; what gives none has their number alone."""
    if cursor.description is None:
        return _Done(cursor.rowcount)
    result = _Result(_metadata(sql, cursor), iter(found))
    result.rowcount = cursor.rowcount
    return result


def _plan(statement: Any, names: tuple[str, ...], *, many: bool) -> _Plan:
    key = id(statement), names, many
    known = _PLANS.get(key)
    if known is None:
        if len(_PLANS) >= 500:
            _PLANS.clear()
        known = _PLANS[key] = _Plan(statement, names, many=many)
    return known


def _text(statement: sa.TextClause) -> tuple[str, list[str]]:
    """The SQL of a text with `:names`, and these in their order."""
    known = _TEXTS.get(statement.text)
    if known is None:
        compiled: Any = statement.compile(dialect=_DIALECT)
        known = _TEXTS[statement.text] = compiled.string, list(compiled.positiontup or ())
    return known


def _processed(row: Sequence[Any], processors: _Processors) -> tuple[Any, ...]:
    values = list(row)
    for at, process in processors:
        values[at] = process(values[at])
    return tuple(values)


def _metadata(sql: str, cursor: sqlite3.Cursor) -> SimpleResultMetaData:
    """The names of what a statement gives; the schema is the same in all worlds."""
    known = _METADATA.get(sql)
    if known is None:
        known = _METADATA[sql] = SimpleResultMetaData(tuple(column[0] for column in cursor.description or ()))
    return known
