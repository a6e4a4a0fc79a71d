"""SQLite in memory, for one simulation alone: what it would do for others and for durability takes long.

A connection has compiled its statements, so the next world gets it, emptied.
"""

from __future__ import annotations

import functools
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

from storage.settings import load_settings
from storage.store import Store

_SPARE: list[sqlite3.Connection] = []
_CONTACTS = [
    *(("CLIENT", str(900 + i), f"client{i}@example.com") for i in range(4)),
    *(("CUSTOMER", str(i), f"customer{i}@example.com") for i in range(1, 5)),
    ("CUSTOMER", "5", "no.mail@example.com"),
]


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


def connect(file: Path | None = None) -> sqlite3.Connection:
    """A connection to an empty database, or to what `file` has."""
    connection = _SPARE.pop() if _SPARE else _new()
    if file is not None:
        source = sqlite3.connect(file)
        source.execute("PRAGMA journal_mode=DELETE")  # a database in memory has no WAL
        source.close()
        connection.deserialize(file.read_bytes())
    return connection


def save(connection: sqlite3.Connection, file: Path) -> None:
    """Have in `file` what is in the database."""
    file.write_bytes(connection.serialize())


def give_back(connection: sqlite3.Connection) -> None:
    """Nobody needs what is in the database any more."""
    if connection.in_transaction:
        connection.execute("ROLLBACK")
    connection.execute("BEGIN")
    for table, given in _first_rows().items():
        connection.execute(f"DELETE FROM {table}")  # noqa: S608  # names of our own
        if given:
            places = ", ".join("?" * len(given[0]))
            connection.executemany(f"INSERT INTO {table} VALUES ({places})", given)  # noqa: S608  # likewise
    connection.execute("COMMIT")
    _SPARE.append(connection)


def _new() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False, cached_statements=500)
    connection.deserialize(empty_database())
    return connection


@functools.cache
def _first_rows() -> dict[str, list[tuple[Any, ...]]]:
    """What is in each table of an empty database."""
    connection = _new()
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    rows = {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in tables}  # noqa: S608  # likewise
    connection.close()
    return rows
