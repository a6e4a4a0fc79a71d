"""A look at the database, for commands that should answer at once.

Where it is SQLite at the newest schema it is read without SQLAlchemy, whose import takes longer than all the rest of
`afterlog status`. Everything else (another database, a schema to be migrated, none yet) goes the common way.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from storage.errors import AfterlogError
from storage.schema import HEAD
from storage.store import Store

Row = dict[str, Any]
_SQLITE = "sqlite:///"
_LARGEST = 2**63 - 1  # no column holds more, and to ask for it is an error


class Look:
    """Runs SELECTs with `:named` parameters; each sees what is committed by then. Not to be shared between threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sqlite = _connect(store.settings.resolved_database_url)

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._sqlite is not None:
            self._sqlite.close()

    def rows(self, sql: str, **parameters: Any) -> list[Row]:
        """The rows of a SELECT, by the names of its columns.

        Raises:
            AfterlogError: the database refused.
        """
        if self._sqlite is not None:
            with _in_a_sentence(self._store):
                cursor = self._sqlite.execute(sql, parameters)
                names = [column[0] for column in cursor.description]
                return [dict(zip(names, row, strict=True)) for row in cursor]
        import sqlalchemy as sa  # see above

        with self._store.database.read() as connection:
            return [dict(row) for row in connection.execute(sa.text(sql), parameters).mappings()]

    def committed_end(self, log: str, partition: int, generation: int | None = None) -> int:
        """Where readers of a derived log stop, of its live generation; 0 where nothing was ever committed."""
        generation = self.live_generation(log) if generation is None else generation
        if max(generation, partition) > _LARGEST:
            return 0
        found = self.rows(
            'SELECT "end" FROM committed_end WHERE log = :log AND generation = :generation AND partition = :partition',
            log=log, generation=generation, partition=partition,
        )  # fmt: skip
        return int(found[0]["end"]) if found else 0

    def generations(self) -> list[int]:
        """The generations of derived logs that there ever were, also those that were discarded."""
        return [1, *(row["generation"] for row in self.rows("SELECT generation FROM replay ORDER BY generation"))]

    def live_generation(self, log: str) -> int:
        """The generation of a derived log that is live; the first where nothing else was said."""
        found = self.rows("SELECT generation FROM live_generation WHERE log = :log", log=log)
        return int(found[0]["generation"]) if found else 1


def _connect(url: str) -> sqlite3.Connection | None:
    """A connection to a SQLite file at the newest schema; None for everything else, which then has its say elsewhere."""
    if not url.startswith(_SQLITE) or "?" in url:
        return None
    try:
        # `rw`, not `ro`: the readers of a WAL take part in its shared memory. It makes no file, and we write nothing.
        connection = sqlite3.connect(f"file:{quote(url.removeprefix(_SQLITE))}?mode=rw", timeout=60, uri=True)
        found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return None
    if found == (HEAD,):
        return connection
    connection.close()
    return None


@contextmanager
def _in_a_sentence(store: Store) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise AfterlogError(
            f"the database refused: {error}",
            where=store.settings.resolved_database_url,
            do="Nothing was changed; check its disk, its rights and AFTERLOG_DATABASE_URL",
        ) from error
