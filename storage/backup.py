"""A backup of a HOME while everything runs: the database as it is at one moment, then the logs, which may be longer.

The order is what makes it whole: whatever the database speaks of was durable in the logs before. The copy of the database is an
SQLite file whichever database it comes from, so a backup can be put back into another one.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import orjson
import sqlalchemy as sa
from sqlmodel import SQLModel

from storage import tables  # noqa: F401  # its classes fill the metadata
from storage.database import Database
from storage.derived import whole_lines
from storage.errors import AfterlogError, UsageError
from storage.locks import locked
from storage.manifest import MANIFEST, archived_end, note_archived, read_manifest, with_archived
from storage.partition import record_partitions, recorded_partitions
from storage.schema import HEAD
from storage.segment import check_contiguous, fsync_directory, fsync_file, list_segments, make_directory, segment_path
from storage.store import CLOCK, DELIVERIES, Store
from storage.times import now

FILE = "afterlog.db"
ARCHIVE_LOCK = "archive.lock"
LABEL = "backup.json"
"""Written last: a folder without it is no whole backup."""
_ROWS = 5_000


class Label(msgspec.Struct):
    """What a backup says of itself: when it was made, the schema of its database, and where each `log/partition` ended."""

    at: int
    schema: str
    logs: dict[str, int]


def make_backup(store: Store, derived: set[str], folder: Path) -> dict[str, int]:
    """Write a backup into `folder`, which is new or empty; gives how many bytes of each `log/partition` are in it.

    `derived` logs are copied up to their committed ends, others to their last whole line; of what became of mails, only
    what will be adopted, since the rest is cut.

    Raises:
        UsageError: there is something in the folder already.
        AfterlogError: a file cannot be read or written, for lack of space say.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("a backup needs a folder of its own", where=str(folder), do="Name one that is new or empty")
    if (store.home / "logs").resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UsageError(
            "a backup among the logs would be taken for one", where=str(folder), do="Name a folder elsewhere"
        )
    at = now()
    try:
        make_directory(folder)
        folder.chmod(0o700)
    except OSError as error:
        raise UsageError(f"cannot make the folder: {error.strerror}", where=str(folder)) from error
    with told("the backup failed", folder, "What is there is no whole backup: make one into another folder"):
        with locked(store.lock_path(ARCHIVE_LOCK)):  # no segment goes from here meanwhile
            copy_database(store.database, folder / FILE)
            copied = _copy_logs(store, derived, folder)
        label = orjson.dumps(
            msgspec.to_builtins(Label(at, HEAD, copied)), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
        )
        _write_file(folder / LABEL, label)
    return copied


def read_label(folder: Path) -> Label:
    """What a backup says of itself, which is true.

    Raises:
        UsageError: the folder is no whole backup.
    """
    try:
        label = msgspec.json.decode((folder / LABEL).read_bytes(), type=Label)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _not_whole(folder, f"a folder with {LABEL}, as `backup` makes it") from error
    if not (folder / FILE).is_file():
        raise _not_whole(folder, f"its database {FILE}")
    for log, end in label.logs.items():
        directory = folder / "logs" / log
        segments = with_archived(directory, list_segments(directory))
        if segments:
            check_contiguous(segments)
        there = segments[-1].base + segments[-1].size() if segments else 0
        if there != end:
            raise _not_whole(folder, f"{end} bytes of {log}", f"{there}")
    return label


def _not_whole(folder: Path, expected: str, found: object = None) -> UsageError:
    return UsageError("no backup, or one that is not whole", where=str(folder), found=found, expected=expected)


@contextmanager
def told(what: str, where: Path, do: str) -> Iterator[None]:
    """Tell in one sentence what a disk or SQLite refused.

    Raises:
        AfterlogError: it did.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise AfterlogError(f"{what}: {error}", where=str(where), do=do) from error


def _copy_logs(store: Store, derived: set[str], folder: Path) -> dict[str, int]:
    ends = _committed_ends(folder / FILE)
    copied = {}
    # What names places in another log is copied before it, so that every place is in the copy: else a restored log gives it to
    # another event. What became of a mail names that of its cause, also by way of a tick; a tick names how far the raw logs go.
    # Derived logs end where the copied database says, so for them the moment does not matter.
    logs = [path for path in (store.home / "logs").iterdir() if path.is_dir()]  # no file of somebody else's
    for path in sorted(logs, key=lambda p: (p.name != DELIVERIES, p.name != CLOCK, p.name)):
        name, _, generation = path.name.partition("@")
        for part in sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()):
            reader = store.reader(name, part, int(generation or 1))
            end = ends.get((name, int(generation or 1), part), 0)
            if name == DELIVERIES:
                end += whole_lines(b"".join(reader.raw(end, reader.end())))
            elif name not in derived:
                end = reader.end()
            # Else a power loss takes it from HOME, other lines take its place, and the backup fits no longer.
            reader.sync(end)
            reader.close()
            copy_segments(path / str(part), folder / "logs" / path.name / str(part), end)
            copied[f"{path.name}/{part}"] = end
        count = recorded_partitions(path / "0")  # after the lines: it is written down before the first of them
        if count is not None:
            record_partitions(folder / "logs" / path.name / "0", count)
    return copied


def copy_database(database: Database, path: Path) -> None:
    """Copy a database as it is at one moment into a new SQLite file."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    if database.engine.dialect.name == "sqlite":
        source = database.engine.raw_connection()
        target = sqlite3.connect(path)
        try:
            assert isinstance(source.driver_connection, sqlite3.Connection)  # noqa: S101  # tells the type checker
            source.driver_connection.backup(target)
        finally:
            target.close()
            source.close()
    else:
        copy = Database(f"sqlite:///{path}", path.parent)
        with copy.write() as target_rows, database.moment() as source_rows:
            copy_rows(source_rows.execution_options(yield_per=_ROWS), target_rows)
        copy.dispose()
        (path.parent / ".migrate.lock").unlink(missing_ok=True)
    close_file(path)


def close_file(path: Path) -> None:
    """Make an SQLite file whole without the files beside it, durably."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    _sync(path)


def copy_rows(source: sa.Connection, target: sa.Connection) -> None:
    """Replace all rows of one database by those of another; each of them at the newest migration."""
    for table in SQLModel.metadata.sorted_tables:
        plain = sa.table(table.name, *(sa.column(c.name, None if _is_money(c) else c.type) for c in table.columns))
        money = [c.name for c in table.columns if _is_money(c)]
        target.execute(sa.delete(plain))
        for part in source.execute(sa.select(*plain.columns)).mappings().partitions(_ROWS):
            target.execute(sa.insert(plain), [_as_text(dict(row), money) for row in part])
        number = table.autoincrement_column
        if target.dialect.name == "postgresql" and number is not None:
            setval = "SELECT setval(pg_get_serial_sequence(:name, :column), coalesce(max({0}), 0) + 1, false) FROM {1}"
            target.execute(
                sa.text(setval.format(f'"{number.name}"', f'"{table.name}"')),
                {"name": f'"{table.name}"', "column": number.name},
            )


def copy_segments(source: Path, target: Path, end: int) -> None:
    """Copy a partition's bytes before offset `end` that are here, durably, a file for each segment, and its chain."""
    make_directory(target)
    if sealed := [entry for entry in read_manifest(source) if entry.end <= end]:
        fsync_file(source / MANIFEST)  # who sealed them may have died before it was durable
        fsync_directory(source)
        _write_file(target / MANIFEST, b"".join(entry.line() + b"\n" for entry in sealed))
        if archived := min(archived_end(source), sealed[-1].end):
            note_archived(target, archived)
    for segment in list_segments(source):
        if segment.base <= end:  # also an empty one: without it the sealed one before it would grow
            copy_file(segment.path, segment_path(target, segment.base), end - segment.base)
    fsync_directory(target)


def copy_file(source: Path, target: Path, length: int) -> None:
    """Copy the first `length` bytes of a file, or all of it where it is shorter; durably, and with its time."""
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with source.open("rb") as reading, os.fdopen(handle, "wb") as writing:
        while length > 0 and (piece := reading.read(min(length, 1 << 20))):
            writing.write(piece)
            length -= len(piece)
        writing.flush()
        os.fsync(handle)
    state = source.stat()
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))


def _is_money(column: sa.Column[Any]) -> bool:
    # SQLite knows no exact numbers of its own, and takes them as text.
    return isinstance(column.type, sa.Numeric) and column.type.asdecimal


def _as_text(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for name in names:
        if row[name] is not None:
            row[name] = str(row[name])
    return row


def _committed_ends(path: Path) -> dict[tuple[str, int, int], int]:
    connection = sqlite3.connect(path)
    try:
        rows = connection.execute('SELECT log, generation, partition, "end" FROM committed_end').fetchall()
    finally:
        connection.close()
    return {(log, generation, partition): end for log, generation, partition, end in rows}


def _write_file(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    _sync(path)


def _sync(path: Path) -> None:
    fsync_file(path)
    fsync_directory(path.parent)
