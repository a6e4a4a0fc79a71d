"""The database as an atomic store: SQLite as it is, which refuses when told to and loses only what was not committed."""

from __future__ import annotations

import functools
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from storage.database import Database, _in_a_sentence
from storage.settings import load_settings
from storage.store import Store
from tests.simulator.connection import Connection, connect
from tests.simulator.disk import Disk


class SimulatedDatabase(Database):
    """One for all processes of a simulation; each statement, begin and commit passes the disk's point."""

    def __init__(self, file: Path, home: Path, disk: Disk) -> None:
        super().__init__(f"sqlite:///{file}", home)
        self.file, self.disk = file, disk
        self._url = sa.make_url(self.url)
        self.after_commit: Callable[[], None] = lambda: None

    @cached_property
    def _connection(self) -> Connection:
        """The one connection: whoever looks while nobody writes sees what is committed."""
        return Connection(connect(self.file), self._pass)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        with _in_a_sentence(self._url):
            yield self._looking()  # type: ignore[misc]  # what is used of one is there

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """A look at what is committed that passes by."""
        return self._looking().raw.execute(sql).fetchall()

    def _looking(self) -> Connection:
        assert not self._connection.raw.in_transaction, "what is not committed yet would be seen"
        return self._connection

    def dispose(self) -> None:
        """Let go of the file, which somebody else may have until the next use."""
        if (connection := self.__dict__.pop("_connection", None)) is not None:
            connection.close()

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        with _in_a_sentence(self._url):
            self._pass("begin")
            with self._connection.begin():
                yield self._connection  # type: ignore[misc]  # likewise
                self._pass("commit")
            if self.disk.process is not None:
                self.after_commit()
            how = self.disk.enter("committed", "")
            if how == "unheard":
                raise _refusal("server closed the connection unexpectedly")
            self.disk.leave(how)

    def _pass(self, call: str, where: str = "") -> None:
        how = self.disk.enter(call, where)
        if how == "refused":
            raise _refusal("database is locked")
        self.disk.leave(how)  # dead is dead, before a statement or after it


def _refusal(said: str) -> sa.exc.OperationalError:
    return sa.exc.OperationalError("", {}, sqlite3.OperationalError(said))


@functools.cache
def empty_database() -> bytes:
    """The file of a database that was made and never used: making one takes long."""
    with tempfile.TemporaryDirectory(prefix="afterlog-") as folder:
        store = Store(load_settings(home=Path(folder)))
        assert store.database.engine
        store.database.dispose()
        file = Path(folder) / "afterlog.db"
        connection = sqlite3.connect(file)
        for type, id, email in _CONTACTS:
            connection.execute(
                "INSERT INTO contact (type, id, email, unsubscribed) VALUES (?, ?, ?, ?)",
                (type, id, email, email.startswith("no")),
            )
        connection.commit()
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.close()
        return file.read_bytes()


_CONTACTS = [
    *(("CLIENT", str(900 + i), f"client{i}@example.com") for i in range(4)),
    *(("CUSTOMER", str(i), f"customer{i}@example.com") for i in range(1, 5)),
    ("CUSTOMER", "5", "no.mail@example.com"),
]
