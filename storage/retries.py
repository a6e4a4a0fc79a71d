"""Which quarantined lines were tried again: noted before and after, so that nobody does it twice unasked."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa

from storage.database import Database
from storage.errors import UsageError
from storage.times import now, show

_WHERE = 'WHERE log = :log AND partition = :partition AND "offset" = :offset'
_READ = sa.text(f"SELECT state, at, to_partition, to_offset FROM retried {_WHERE}")  # noqa: S608  # a constant
_FORGET = sa.text(f"DELETE FROM retried {_WHERE}")  # noqa: S608  # likewise
_INSERT = (
    'INSERT INTO retried (log, partition, "offset", state, at, to_partition, to_offset) '
    'VALUES (:log, :partition, :offset, :state, :at, :to_partition, :to_offset) ON CONFLICT (log, partition, "offset") DO '
)
_CLAIM = sa.text(_INSERT + "NOTHING")
_UPSERT = sa.text(
    _INSERT
    + "UPDATE SET state = excluded.state, at = excluded.at, to_partition = excluded.to_partition, to_offset = excluded.to_offset"
)


class Place(NamedTuple):
    """Where a quarantined line is."""

    log: str
    partition: int
    offset: int


def begin_retry(database: Database, place: Place, *, force: bool) -> None:
    """Note that a line is about to be appended again.

    Raises:
        UsageError: it was before, or somebody died at it, and `force` does not say that this is meant.
    """
    with database.write() as connection:
        # Not looked at first: two who look at once would both find nothing.
        while not _set(connection, place, "BEGUN", -1, -1, over=force):
            before = connection.execute(_READ, place._asdict()).first()
            if before is None:
                continue  # it was forgotten just now
            there = f"{place.log}:{before.to_partition}:{before.to_offset}"
            raise UsageError(
                "this line was tried again before",
                where=":".join(map(str, place)),
                found=f"{there if before.state == 'DONE' else 'a try whose end is not known'}, at {show(before.at)}",
                do="A second time would count it twice: --force, if that is meant",
            )


def finish_retry(database: Database, place: Place, partition: int, offset: int) -> None:
    """Note where the line is now."""
    with database.write() as connection:
        _set(connection, place, "DONE", partition, offset)


def forget_retry(database: Database, place: Place) -> None:
    """The line was certainly not appended."""
    with database.write() as connection:
        connection.execute(_FORGET, place._asdict())


def _set(
    connection: sa.Connection, place: Place, state: str, partition: int, offset: int, *, over: bool = True
) -> bool:
    """Write the row; whether it was, which it is not where there is one that it may not write `over`."""
    values = {**place._asdict(), "state": state, "at": now(), "to_partition": partition, "to_offset": offset}
    return bool(connection.execute(_UPSERT if over else _CLAIM, values).rowcount)
