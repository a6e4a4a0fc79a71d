"""SQLAlchemy's own connection in place of the quick one, to see that a seed cannot tell them apart."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa


class ThroughSQLAlchemy:
    """What `tests.simulator.connection.Connection` is, slowly."""

    def __init__(self, raw: sqlite3.Connection, point: Callable[[str, str], None]) -> None:
        self.raw, self._point = raw, point
        self._engine = sa.create_engine("sqlite://", creator=lambda: raw, poolclass=sa.StaticPool)
        self._connection = self._engine.connect()
        self.dialect = self._engine.dialect

    @contextmanager
    def begin(self) -> Iterator[None]:
        """A transaction."""
        self._connection.rollback()  # that of the looks before it, which SQLite never heard of
        with self._connection.begin():
            self.exec_driver_sql("BEGIN IMMEDIATE")
            yield

    def close(self) -> None:
        """Close it, and the connection to SQLite with it."""
        self._connection.rollback()
        self._connection.close()
        self._engine.dispose()

    def execute(self, statement: Any, *parameters: Any) -> Any:
        """As SQLAlchemy's; here and below the point is passed first: who is killed within SQLAlchemy costs it its connection."""
        self._point("execute", str(statement).split(" ", 1)[0])
        return self._connection.execute(statement, *parameters)

    def scalar(self, statement: Any, *parameters: Any) -> Any:
        """As SQLAlchemy's."""
        return self.execute(statement, *parameters).scalar()

    def scalars(self, statement: Any, *parameters: Any) -> Any:
        """As SQLAlchemy's."""
        return self.execute(statement, *parameters).scalars()

    def exec_driver_sql(self, sql: str, *parameters: Any) -> Any:
        """As SQLAlchemy's."""
        self._point("execute", sql.split(" ", 1)[0])
        return self._connection.exec_driver_sql(sql, *parameters)
