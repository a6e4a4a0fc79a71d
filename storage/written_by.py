"""Which run wrote which stretch of a derived log: noted with the first commit in which a run writes to it.

Prefect's own history ends after some weeks; this stays with the database, a row for each run that wrote something.
"""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa

from storage.times import now

_NOTE = sa.text(
    'INSERT INTO written_by (log, generation, "partition", start, run, flow_run_id, since) '
    "VALUES (:log, :generation, :partition, :start, :run, :flow_run_id, :since) "
    'ON CONFLICT (log, generation, "partition", start) '
    "DO UPDATE SET run = excluded.run, flow_run_id = excluded.flow_run_id, since = excluded.since"
)


class Author(NamedTuple):
    """A run in words, and Prefect's id of it; empty where Prefect does not know it."""

    run: str
    flow_run_id: str = ""


def note(
    connection: sa.Connection, author: Author, log: str, start: int, *, partition: int, generation: int = 1
) -> None:
    """Note that `author` writes a derived log from byte offset `start` on; part of the transaction that moves its end."""
    place = {"log": log, "generation": generation, "partition": partition, "start": start}
    connection.execute(_NOTE, [{**place, "run": author.run, "flow_run_id": author.flow_run_id, "since": now()}])
