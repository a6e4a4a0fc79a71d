"""The last failure of each processor, so that `status` can tell one that fails from one that nobody runs."""

from __future__ import annotations

import sqlalchemy as sa

from storage.database import Database
from storage.times import now

_LONGEST = 500
_NOTE = sa.text(
    "INSERT INTO failure (processor, at, times, reason) VALUES (:processor, :at, 1, :reason) "
    "ON CONFLICT (processor) DO UPDATE SET at = excluded.at, reason = excluded.reason, times = CASE WHEN failure.at < "
    "(SELECT COALESCE(MAX(committed_at), 0) FROM checkpoint WHERE checkpoint.processor = failure.processor) "
    "THEN 1 ELSE failure.times + 1 END"
)


def note_failure(database: Database, processor: str, reason: object) -> None:
    """Write down that a processor failed, and why; the times are counted from its last commit on."""
    with database.write() as connection:
        connection.execute(_NOTE, {"processor": processor, "at": now(), "reason": str(reason)[:_LONGEST]})
