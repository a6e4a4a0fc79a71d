"""The database: made and migrated at first use, one writer's transaction at a time.

SQLite in WAL with synchronous FULL is the default, PostgreSQL the other. A transaction that reads before it writes is safe
on both: SQLite lets one writer in at a time; elsewhere a swap (`UPDATE ... WHERE` what was read) finds out.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from storage import postgresql
from storage.errors import AfterlogError
from storage.locks import locked
from storage.schema import HEAD

# Said in words, not with the tables' classes: SQLModel takes half a second to import, and reading a log needs none of it.
_COMMITTED_END = sa.text(
    'SELECT "end" FROM committed_end WHERE log = :log AND generation = :generation AND partition = :partition'
)
_LIVE_GENERATION = sa.text("SELECT generation FROM live_generation WHERE log = :log")


class Database:
    """One engine; `write()` gives a transaction that commits or leaves no trace, `read()` a look."""

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.home = url, home

    @cached_property
    def engine(self) -> sa.Engine:
        """The engine, its schema at the newest migration.

        Raises:
            UsageError: the URL is none of a database that Afterlog knows.
            AfterlogError: the database is newer than this program.
        """
        url = postgresql.database_url(self.url)
        if url.get_backend_name() == "sqlite":
            options: dict[str, Any] = {"connect_args": {"timeout": 60, "check_same_thread": False}}
            _make_private(url.database)
        else:
            postgresql.check_driver()
            options = dict(postgresql.connect_options(url))
        engine = sa.create_engine(url, **options)
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _configure_sqlite)
            sa.event.listen(engine, "begin", _begin_immediate)
        else:
            sa.event.listen(engine, "connect", postgresql.configure)
        self._migrate(engine)
        return engine

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction: all of it or nothing."""
        with _in_a_sentence(self.engine.url), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection for looking only; every statement sees what is committed by then."""
        looking = {"isolation_level": "AUTOCOMMIT"}
        with _in_a_sentence(self.engine.url), self.engine.connect().execution_options(**looking) as connection:
            yield connection

    @contextmanager
    def moment(self) -> Iterator[sa.Connection]:
        """A transaction for looking only: all its statements see the database as it is at one moment."""
        with self.write() as connection:
            if connection.dialect.name != "sqlite":  # there nobody writes meanwhile
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[sa.Connection]:
        """As `moment`, for a look that takes long: others write meanwhile, on SQLite too."""
        begin = "BEGIN" if self._is_sqlite else "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
        with self.read() as connection:
            connection.exec_driver_sql(begin)
            try:
                yield connection
            finally:
                connection.exec_driver_sql("ROLLBACK")

    @contextmanager
    def alone(self) -> Iterator[sa.Connection]:
        """A connection for several transactions, each by its `begin()`, that is closed afterwards, temporary tables and all."""
        with _in_a_sentence(self.engine.url), self.engine.connect() as connection:
            try:
                yield connection
            finally:
                connection.invalidate()  # else the next one to use it finds what is left

    def sorted_as(self, text: str) -> str:
        """What the database puts in place of a text where it sorts by it."""
        return text if self._is_sqlite else postgresql.escape(text)

    @cached_property
    def _is_sqlite(self) -> bool:
        return postgresql.database_url(self.url).get_backend_name() == "sqlite"

    def committed_end(self, log: str, partition: int, generation: int) -> int:
        """Where readers of a derived log stop; 0 where nothing was ever committed."""
        place = {"log": log, "generation": generation, "partition": partition}
        with self.read() as connection:
            return int(connection.scalar(_COMMITTED_END, place) or 0)

    def live_generation(self, log: str) -> int:
        """The generation of a derived log that is live; the first where nothing else was said."""
        with self.read() as connection:
            return int(connection.scalar(_LIVE_GENERATION, {"log": log}) or 1)

    def dispose(self) -> None:
        """Close every connection."""
        if "engine" in self.__dict__:
            self.engine.dispose()

    def _migrate(self, engine: sa.Engine) -> None:
        if _revision(engine) == HEAD:
            return
        with locked(self.home / ".migrate.lock"):
            if _revision(engine) == HEAD:
                return
            from alembic import command  # half a second of imports that only a new schema needs
            from alembic.config import Config
            from alembic.util import CommandError

            config = Config()
            config.set_main_option("script_location", "storage:migrations")
            with _in_a_sentence(engine.url), engine.begin() as connection:
                config.attributes["connection"] = connection
                try:
                    command.upgrade(config, "head")
                except CommandError as error:
                    raise AfterlogError(
                        f"the database is of another version of Afterlog: {error}",
                        where=postgresql.shown(engine.url),
                        do="Run the version of Afterlog that wrote it, or a newer one",
                    ) from error


def _revision(engine: sa.Engine) -> str | None:
    with _in_a_sentence(engine.url), engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return str(connection.scalar(sa.text("SELECT version_num FROM alembic_version")))


@contextmanager
def _in_a_sentence(url: sa.URL) -> Iterator[None]:
    """Tell what the database refused without a page of SQL around it, and never its password.

    What another database refused, of two that are at work, is left to whoever asked that.
    """
    try:
        yield
    except PoolTimeout as error:
        raise AfterlogError(
            "every connection to the database that a process may have is in use, and none came back in time",
            where=postgresql.shown(url),
            do="Nothing was changed; look for what holds the database up, a lock say, and start it again",
        ) from error
    except DBAPIError as error:
        if isinstance(error.orig, sqlite3.Error) != (url.get_backend_name() == "sqlite"):
            raise
        said = " ".join(str(error.orig).split())
        for secret in postgresql.secrets(url):
            said = said.replace(secret, "***")
        if error.connection_invalidated:
            raise AfterlogError(
                f"the connection to the database was lost: {said}",
                where=postgresql.shown(url),
                do="Start it again: what was committed stands, and the work goes on from there",
            ) from error
        raise AfterlogError(
            f"the database refused: {said}",
            where=postgresql.shown(url),
            do="Nothing was changed; check that it runs, its disk, its rights and AFTERLOG_DATABASE_URL",
        ) from error


def _make_private(file: str | None) -> None:
    """Have the database's file for its owner only; SQLite gives the files beside it the same rights."""
    if file and not file.startswith(("file:", ":memory:")):
        try:
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
        except OSError:
            return  # SQLite says why in its own words
        if Path(file).stat().st_mode & 0o077:
            Path(file).chmod(0o600)


def _configure_sqlite(connection: Any, _record: object) -> None:
    # The driver's own transactions begin too late; SQLAlchemy's "begin" says it in full.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        "page_size=8192",  # of a new database: state is rows of some hundred bytes, and fewer pages are less work
        "journal_mode=WAL",
        "synchronous=FULL",
        "cache_size=-2000",
        "wal_autocheckpoint=2000",
        "busy_timeout=60000",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediate(connection: sa.Connection) -> None:
    # Two transactions that both read before they write would otherwise fail at once, whatever the timeout.
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
