"""The database as an atomic store: SQLite as it is, which refuses when told to and loses only what was not committed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from storage.database import Database, _in_a_sentence
from tests.simulator.connection import Connection
from tests.simulator.disk import Disk
from tests.simulator.memory import connect, save


class SimulatedDatabase(Database):
    """One for all processes of a simulation; each statement, begin and commit passes the disk's point."""

    def __init__(self, file: Path, home: Path, disk: Disk) -> None:
        super().__init__(f"sqlite:///{file}", home)
        self.file, self.disk = file, disk
        self._url = sa.make_url(self.url)
        self.after_commit: Callable[[], None] = lambda: None
        self._opened = 0

    @cached_property
    def _connection(self) -> Connection:
        """The one connection: whoever looks while nobody writes sees what is committed."""
        self._opened += 1
        return Connection(connect(self.file if self.file.exists() else None), self._pass)

    def read(self) -> AbstractContextManager[sa.Connection]:
        return _Look(self)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """A look at what is committed that passes by."""
        return self.looking().raw.execute(sql).fetchall()

    @property
    def moment(self) -> tuple[int, int]:
        """Another one, once any row has changed or another file was put in place."""
        return self._opened, self.looking().raw.total_changes

    def looking(self) -> Connection:
        """The connection, for whoever wants what is committed."""
        assert not self._connection.raw.in_transaction, "what is not committed yet would be seen"
        return self._connection

    def dispose(self) -> None:
        """Write the file, which somebody else may have until the next use."""
        if "_connection" in self.__dict__:
            save(self._connection.raw, self.file)
            self.close()

    def close(self) -> None:
        """Let go of what is in it, for good or because the file has it."""
        if (connection := self.__dict__.pop("_connection", None)) is not None:
            connection.close()

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        try:
            self._pass("begin")
            with self._connection.begin():
                yield self._connection  # type: ignore[misc]  # what is used of one is there
                self._pass("commit")
            if self.disk.process is not None:
                self.after_commit()
            how = self.disk.enter("committed", "")
            if how == "unheard":
                raise _refusal("server closed the connection unexpectedly")
            self.disk.leave(how)
        except sa.exc.DBAPIError as error:
            self.tell(error)

    def tell(self, error: sa.exc.DBAPIError) -> None:
        """Raise what is made of an error everywhere else."""
        with _in_a_sentence(self._url):
            raise error

    def _pass(self, call: str, where: str = "") -> None:
        if how := self.disk.enter(call, where):
            if how == "refused":
                raise _refusal("database is locked")
            self.disk.leave(how)  # dead is dead, before a statement or after it


class _Look:
    """`Database.read`, which is asked for so often that a generator would be felt."""

    def __init__(self, database: SimulatedDatabase) -> None:
        self._database = database

    def __enter__(self) -> Any:
        return self._database.looking()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, sa.exc.DBAPIError):
            self._database.tell(error)


def _refusal(said: str) -> sa.exc.OperationalError:
    return sa.exc.OperationalError("", {}, sqlite3.OperationalError(said))
