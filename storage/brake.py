"""The brake of delivery: one row that says whether mails may be claimed, and what "the usual" is.

PAUSED by a person, STOPPED by delivery itself, else RUNNING. `Outbox.claim` asks in the very statement that claims.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from storage.database import Database
from storage.times import now

DELIVER = "deliver"
RUNNING, PAUSED, STOPPED = "RUNNING", "PAUSED", "STOPPED"
HOUR, BUCKET = 3_600_000, 600_000
LOOK_BACK = 7 * 24 * HOUR
"""How far back "the usual" looks, and how long tallies are kept."""

_READ = sa.text("SELECT state, reason, since FROM brake WHERE name = :name")
_UPSERT = (
    "INSERT INTO brake (name, state, reason, since) VALUES (:name, :state, :reason, :since) "
    "ON CONFLICT (name) DO UPDATE SET state = excluded.state, reason = excluded.reason, since = excluded.since"
)
_SET = sa.text(_UPSERT)
_HOLD = sa.text(f"{_UPSERT} WHERE brake.state = 'RUNNING'")
_CLEAR = sa.text("UPDATE delivery SET cleared = :yes WHERE state = 'WAITING' AND cleared = :no")
_SENT_BY_HOUR = sa.text(
    "SELECT COUNT(*) FROM delivery WHERE state = 'SENT' AND changed_at >= :first AND changed_at < :last "
    "GROUP BY changed_at / 3600000"
)
_TALLY_BY_HOUR = sa.text(
    "SELECT SUM(count) FROM tally WHERE what = :what AND bucket >= :first AND bucket < :last GROUP BY bucket / 3600000"
)
_TALLY_SINCE = sa.text("SELECT SUM(count) FROM tally WHERE what = :what AND bucket >= :first")


@dataclass(frozen=True)
class Brake:
    """Whether mails may be claimed, why not, and since when that is so (milliseconds)."""

    state: str = RUNNING
    reason: str = ""
    since: int = 0

    @property
    def is_on(self) -> bool:
        """Whether mails are held."""
        return self.state != RUNNING


def read_brake(database: Database) -> Brake:
    """The brake as it is now."""
    with database.read() as connection:
        return _brake(connection)


def put_on(database: Database, state: str, reason: str) -> Brake:
    """Hold all mails, PAUSED or STOPPED; where they are held already, nothing changes. Gives the brake as it is then.

    Once this returns, no mail is claimed; one that was claimed before may still be on its way.
    """
    with database.write() as connection:
        # Not looked at first: of two at once the second would replace the first.
        connection.execute(_HOLD, _row(Brake(state, reason, now())))
        return _brake(connection)


def release(database: Database) -> int:
    """Let mails be claimed again; gives how many had been held, which the brake will not count again."""
    with database.write() as connection:
        connection.execute(_SET, _row(Brake(RUNNING, "", now())))
        return connection.execute(_CLEAR, {"yes": True, "no": False}).rowcount


def usual_mails(database: Database, wall: int) -> float:
    """Mails sent in a usual hour: the median of the hours of the last 7 days in which there were any, but for the last one."""
    with database.read() as connection:
        return _median(connection.scalars(_SENT_BY_HOUR, {"first": wall - LOOK_BACK, "last": wall - HOUR}))


def usual_tally(database: Database, what: str, before: int) -> float:
    """How many there are in a usual hour, likewise, up to `before`."""
    with database.read() as connection:
        return _median(connection.scalars(_TALLY_BY_HOUR, {"what": what, "first": before - LOOK_BACK, "last": before}))


def tally_since(database: Database, what: str, since: int) -> int:
    """How many there were since then, to the ten minutes."""
    with database.read() as connection:
        return int(connection.scalar(_TALLY_SINCE, {"what": what, "first": since // BUCKET * BUCKET}) or 0)


def _brake(connection: sa.Connection) -> Brake:
    row = connection.execute(_READ, {"name": DELIVER}).first()
    return Brake(*row) if row is not None else Brake()


def _row(brake: Brake) -> dict[str, Any]:
    return {"name": DELIVER, **vars(brake)}


def _median(counts: Iterable[int]) -> float:
    return float(statistics.median(found) if (found := [int(count) for count in counts]) else 0)
