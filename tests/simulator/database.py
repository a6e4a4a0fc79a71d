"""The database as an atomic store: SQLite as it is, which refuses when told to and loses only what was not committed."""

from __future__ import annotations

import functools
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.util import LRUCache

from storage.database import Database, _begin_immediate, _configure_sqlite, _in_a_sentence
from storage.settings import load_settings
from storage.store import Store
from tests.simulator.disk import Disk


class SimulatedDatabase(Database):
    """One for all processes of a simulation; each statement, begin and commit passes the disk's point."""

    def __init__(self, file: Path, home: Path, disk: Disk) -> None:
        super().__init__(f"sqlite:///{file}", home)
        self.disk = disk

    @cached_property
    def engine(self) -> sa.Engine:
        engine = sa.create_engine(self.url, connect_args={"timeout": 0, "check_same_thread": False})
        engine._compiled_cache = _COMPILED  # an engine a world: what SQLAlchemy has compiled serves them all
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "connect", _do_not_wait)
        sa.event.listen(engine, "begin", _begin_immediate)
        sa.event.listen(engine, "before_cursor_execute", self._execute)
        return engine

    @cached_property
    def _writing(self) -> sa.Connection:
        return self.engine.connect()  # kept: to get one costs more than most statements

    @cached_property
    def _reading(self) -> sa.Connection:
        return self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        with _in_a_sentence(self.engine):
            try:
                yield self._reading
            finally:
                self._reading.rollback()

    def dispose(self) -> None:
        for connection in (self._writing, self._reading):
            connection.close()
        super().dispose()

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        with _in_a_sentence(self.engine):
            self._pass("begin")
            with self._writing.begin():
                yield self._writing
                self._pass("commit")
            how = self.disk.enter("committed", "")
            if how == "unheard":
                raise _refusal("server closed the connection unexpectedly")
            self.disk.leave(how)

    def _execute(self, _connection: object, _cursor: object, statement: str, *_more: object) -> None:
        self._pass("execute", statement.split(" ", 1)[0])

    def _pass(self, call: str, where: str = "") -> None:
        how = self.disk.enter(call, where)
        if how == "refused":
            raise _refusal("database is locked")
        self.disk.leave(how)  # dead is dead, before a statement or after it


_COMPILED: LRUCache[Any, Any] = LRUCache(1_000)


def _refusal(said: str) -> sa.exc.OperationalError:
    return sa.exc.OperationalError("", {}, sqlite3.OperationalError(said))


def _do_not_wait(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA busy_timeout=0")


@functools.cache
def empty_database() -> bytes:
    """The file of a database that was made and never used: making one takes long."""
    with tempfile.TemporaryDirectory(prefix="afterlog-") as folder:
        store = Store(load_settings(home=Path(folder)))
        assert store.database.engine
        store.database.dispose()
        file = Path(folder) / "afterlog.db"
        connection = sqlite3.connect(file)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for type, id, email in _CONTACTS:
            connection.execute(
                "INSERT INTO contact (type, id, email, unsubscribed) VALUES (?, ?, ?, ?)",
                (type, id, email, email.startswith("no")),
            )
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        return file.read_bytes()


_CONTACTS = [
    *(("CLIENT", str(900 + i), f"client{i}@example.com") for i in range(4)),
    *(("CUSTOMER", str(i), f"customer{i}@example.com") for i in range(1, 5)),
    ("CUSTOMER", "5", "no.mail@example.com"),
]
