"""Who follows for a flow: shifts hand over through one row of the database."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from storage.database import Database
from storage.tables import FlowOwner
from storage.times import now

_TABLE: sa.Table = FlowOwner.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
_UPSERT = sa.text(
    "INSERT INTO flow_owner (flow, run_id, since, scheduled) VALUES (:flow, :run_id, :since, :scheduled) "
    "ON CONFLICT (flow) DO UPDATE SET run_id = excluded.run_id, since = excluded.since, scheduled = excluded.scheduled"
)


@dataclass(frozen=True)
class Owner:
    """The run that follows, since when, and for when it had been scheduled (milliseconds)."""

    run_id: str
    since: int
    scheduled: int


def owner_of(database: Database, flow: str) -> Owner | None:
    """The run that follows for `flow` now, or did last."""
    with database.read() as connection:
        row = connection.execute(sa.select(_TABLE).where(_TABLE.c.flow == flow)).mappings().first()
    return None if row is None else Owner(row["run_id"], row["since"], row["scheduled"])


def take_over(database: Database, flow: str, run_id: str, scheduled: int) -> None:
    """Make `run_id` the one that follows for `flow`; the one before sees it and lets go."""
    with database.write() as connection:
        connection.execute(_UPSERT, [{"flow": flow, "run_id": run_id, "since": now(), "scheduled": scheduled}])
