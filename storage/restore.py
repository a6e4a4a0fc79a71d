"""Putting a backup back, so that nothing of a log is lost and nobody is mailed twice.

Logs only grow: of two copies of a partition the longer one stays. The database is replaced as a whole, by one that says of every
mail whose outcome it does not know that it may have been sent since.
"""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson
import sqlalchemy as sa

from storage import postgresql
from storage.append import LOCK
from storage.backup import FILE, close_file, copy_file, copy_rows
from storage.database import Database
from storage.errors import AfterlogError
from storage.lacking import lacking
from storage.locks import locked
from storage.mails import CLAIMED, FAILED, MAY_HAVE_BEEN_SENT, SENT, SUPPRESSED, UNKNOWN, WAITING
from storage.manifest import archived_end, name_of, note_archived, with_archived
from storage.partition import PARTITIONS, record_partitions, recorded_partitions
from storage.segment import check_contiguous, file_end, fsync_directory, list_segments, make_directory
from storage.store import Store
from storage.tables import Delivery
from storage.tables import Restored as RestoredRow
from storage.times import now

_BESIDE = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a file, and applies to whichever file it finds under that name."""
_PATIENCE = 5.0
"""How many seconds whoever reads the database may take, before a restore gives up."""
_LAST = sa.text("SELECT at, ends FROM restored ORDER BY at DESC LIMIT 1")
_LIVE_GENERATIONS = sa.text("SELECT log, generation FROM live_generation")


class Doubts(NamedTuple):
    """What a restore has put in doubt: mails of the queue, and what people had decided that nobody had carried out."""

    mails: int
    decisions: int


@dataclass(frozen=True)
class Restored:
    """A moment at which a backup was put back, and how far the logs that are not derived went then."""

    at: int
    ends: dict[str, int]


def restore_logs(store: Store, folder: Path) -> list[str]:
    """Put back what HOME's logs lack; gives the partitions that were put back. What HOME has more of stays.

    A producer that appends meanwhile waits while its partition is put back.

    Raises:
        AfterlogError: a log in HOME and its copy differ where both have bytes. Nothing was changed, unless a producer made
            that difference just now: then partitions before this one were put back.
    """
    copies = [path for path in sorted((folder / "logs").glob("*/*")) if path.is_dir()]  # no file of somebody else's
    places = [(store.home / copy.relative_to(folder), copy) for copy in copies]
    found = {there: (copy, lacking(there, copy)) for there, copy in places}
    wanted = {there: copy for there, (copy, files) in found.items() if files}
    _put_back_counts(store, folder)
    for there, copy in wanted.items():
        make_directory(there)
        with locked(there / LOCK):
            # All of it is compared again, before any of it is changed: what was appended since must not be lost.
            for source, target in lacking(there, copy) or []:
                _put_back(source, target)
    for there, (copy, files) in found.items():
        if files is not None and (archived := archived_end(copy)) > archived_end(there):
            note_archived(there, archived)
    for there in wanted:
        check_contiguous(with_archived(there, list_segments(there)))
    return sorted(map(name_of, wanted))


def restore_database(store: Store, folder: Path, derived: set[str]) -> Doubts:
    """Replace the database by the backup's, marked as restored, in one step; gives what is in doubt.

    Raises:
        AfterlogError: the backup's is damaged, or somebody is at work on the one to be replaced, which was not changed.
    """
    url = postgresql.database_url(store.settings.resolved_database_url)
    is_file = url.get_backend_name() == "sqlite"
    live = Path(str(url.database)).resolve() if is_file else store.home / FILE
    draft = live.with_name(f"{live.name}.restoring")  # beside it: one step is possible only within a file system
    fresh = Database(f"sqlite:///{draft}", store.home)
    try:
        _remove(draft)  # what a restore that was killed left beside it would be applied to this one
        copy_file(folder / FILE, draft, 1 << 62)
        _check_sound(draft, folder / FILE)
        doubts = mark_restored(fresh, store, derived)  # it is migrated on the way
        if is_file:
            fresh.dispose()
            close_file(draft)
            _swap_files(draft, live)
        else:
            with store.database.write() as target, fresh.write() as source:
                copy_rows(source.execution_options(yield_per=5_000), target)
    finally:
        fresh.dispose()
        _remove(draft)
    return doubts


def mark_restored(database: Database, store: Store, derived: set[str]) -> Doubts:
    """Write down that a database is an older one from now on; gives what is in doubt.

    A mail without an outcome may have been sent since: the log `deliveries` may still know, else a person must. So may one that
    was to be sent once more by a decision, which somebody may have carried out since.
    """
    table: sa.Table = Delivery.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
    moment: sa.Table = RestoredRow.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
    _make_live_folders(database, store)
    before = last_restored(database)
    # Always the latest, also where two come within a millisecond or the wall clock went back.
    at, ends = max(now(), before.at + 1 if before else 0), _ends(store, derived)
    open_ones = table.c.state.not_in([SENT, SUPPRESSED, FAILED, UNKNOWN])
    with database.write() as connection:
        connection.execute(sa.insert(moment), [{"at": at, "ends": orjson.dumps(ends).decode()}])
        too_old = (
            table.c.state == WAITING,
            table.c.not_after < at,
        )  # SUPPRESSED soon, and this tells why nobody can say more
        connection.execute(sa.update(table).where(*too_old).values(reason=MAY_HAVE_BEEN_SENT))
        done = connection.execute(
            sa.update(table)
            .where(open_ones, table.c.not_after >= at)
            .values(state=CLAIMED, reason=MAY_HAVE_BEEN_SENT, changed_at=at)
        )
        dropped = connection.execute(sa.text("DELETE FROM decision"))
    return Doubts(done.rowcount, dropped.rowcount)


def _make_live_folders(database: Database, store: Store) -> None:
    """Have a folder of every generation that is live: a store goes by them, and one of a log that is empty yet had no file to put back."""
    with database.read() as connection:
        live = connection.execute(_LIVE_GENERATIONS).all()
    for log, generation in live:
        make_directory(store.directory(log, 0, generation))


def last_restored(database: Database) -> Restored | None:
    """The last time that a backup was put back; None if never."""
    with database.read() as connection:
        row = connection.execute(_LAST).first()
    return None if row is None else Restored(row.at, orjson.loads(row.ends))


def _ends(store: Store, derived: set[str]) -> dict[str, int]:
    return {
        f"{log}/{part}": file_end(store.directory(log, part, 1))
        for log in store.logs()
        if log not in derived
        for part in store.partitions(log, 1)
    }


def _put_back_counts(store: Store, folder: Path) -> None:
    """Have each log keep the number of partitions that it was begun with.

    Raises:
        AfterlogError: a log in HOME was begun with another. Nothing was changed.
    """
    found = sorted(path.parent for path in (folder / "logs").glob(f"*/0/{PARTITIONS}"))
    counts = {store.home / path.relative_to(folder): recorded_partitions(path) for path in found}
    for first, count in counts.items():
        there = recorded_partitions(first)
        if there and count and there != count:
            raise AfterlogError(
                "the log in HOME is another one than the backup's: it has another number of partitions",
                where=str(first / PARTITIONS), found=there, expected=count,
                do="Restore into a new HOME, or move this log away if it is damaged; it was not changed",
            )  # fmt: skip
    for first, count in counts.items():
        if count:
            record_partitions(first, count)


def _put_back(source: Path, target: Path) -> None:
    draft = target.with_suffix(".restoring")
    try:
        copy_file(source, draft, source.stat().st_size)
        draft.rename(target)
    finally:
        draft.unlink(missing_ok=True)
    fsync_directory(target.parent)


def _swap_files(draft: Path, live: Path) -> None:
    """Put one SQLite file in another's place; the other one is kept beside it, as it was.

    Raises:
        AfterlogError: somebody is reading or writing it; it was not changed.
    """
    if live.exists():
        _make_whole(live)
        kept = live.with_name(live.name + ".replaced")
        kept.unlink(missing_ok=True)
        os.link(live, kept)
    _remove(live, _BESIDE)
    fsync_directory(live.parent)  # nor may a power loss give the new one what was the old one's
    draft.replace(live)
    fsync_directory(live.parent)


def _check_sound(draft: Path, source: Path) -> None:
    """Make sure that SQLite finds no fault in a copy.

    Raises:
        AfterlogError: it does.
    """
    connection = sqlite3.connect(draft)
    try:
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        found = error
    finally:
        connection.close()
    if found != "ok":
        raise AfterlogError(
            "the backup's database is damaged", where=str(source), found=found,
            do="Put another backup back: the database in use was not changed",
        )  # fmt: skip


def _remove(file: Path, suffixes: tuple[str, ...] = ("", *_BESIDE)) -> None:
    """Remove an SQLite file, or only what is beside it."""
    for suffix in suffixes:
        file.with_name(file.name + suffix).unlink(missing_ok=True)


def _make_whole(live: Path) -> None:
    """Have all of a database in its one file, unless it is damaged: that is what a restore is for."""
    old = sqlite3.connect(live, timeout=_PATIENCE)
    try:
        row = old.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        busy = row is not None and row[0]
    except sqlite3.DatabaseError as error:
        busy = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    finally:
        old.close()
    if busy:
        raise AfterlogError(
            "somebody is at work on the database, which cannot be replaced meanwhile", where=str(live),
            do="End whatever has it open, and restore again: the database was not changed",
        )  # fmt: skip
